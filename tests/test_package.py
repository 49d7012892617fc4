"The package as one meets it: pins, imports, notebooks, the front page's commands, and a .venv that make keeps whole."
import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from common import ENV, NOTEBOOKS, python, ROOT
from packaging.requirements import Requirement

MODULES = sorted('.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in (ROOT / 'solar_repro').rglob('*.py')
                 if not p.name.startswith('_'))
LIGHT = [f'solar_repro.{m}' for m in ('paper', 'tables', 'core.config', 'core.store', 'stages.graph', 'reports.cli')]


def settings() -> dict:
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


# ---- the steps of `make test` that come before pytest

STEPS = dict(CHECK=['sh', 'tools/check.sh'], NOTEBOOKS=['nbdev_test', '--n_workers', '2'])


@pytest.mark.parametrize('step', STEPS)
def test_step(step):
    "`make test` has run it and hands over its exit status; without that it is run here."
    code = os.environ.get(f'STEP_{step}')
    if code is None:
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
        done = subprocess.run(STEPS[step], cwd=ROOT, capture_output=True, text=True, env={**ENV, 'PATH': path})
        print(done.stdout, done.stderr)
        code = str(done.returncode)
    assert code == '0', f'`{shlex.join(STEPS[step])}` failed with status {code}; what it said stands above'


# ---- pins

def test_settings_and_environment_name_the_same_pins():
    ini, env = settings(), yaml.safe_load((ROOT / 'environment.yml').read_text())
    conda = [d for d in env['dependencies'] if isinstance(d, str)]
    pip = [d for d in env['dependencies'] if isinstance(d, dict)][0]['pip']
    assert 'python=3.11' in conda
    assert pip == [*shlex.split(ini['requirements']), *shlex.split(ini['dev_requirements']), '-e .']


def test_what_is_installed_is_what_is_pinned():
    ini = settings()
    pins = [Requirement(r) for r in shlex.split(f"{ini['requirements']} {ini['dev_requirements']}")]
    exact = {r.name for r in pins if str(r.specifier).startswith('==')}
    assert exact >= {
        'torch',
        'transformers',
        'trl',
        'peft',
        'bitsandbytes',
        'accelerate',
        'datasets',
        'lm-eval',
        'nbdev',
    }
    found = {r.name: importlib.metadata.version(r.name).split('+')[0] for r in pins}
    wrong = [f'{r}: {found[r.name]} is installed' for r in pins if not r.specifier.contains(found[r.name])]
    assert not wrong


def test_package_data_is_packed(tmp_path):
    "Profiles, task files and the base model travel with the package."
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'solar_repro', tmp_path / 'solar_repro', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', 'out'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    here = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'solar_repro').rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    }
    packed = {p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*') if p.is_file()}
    assert 'solar_repro/profiles/tiny.toml' in packed and 'solar_repro/tasks/arc.yaml' in packed
    assert 'solar_repro/tiny/base/model.safetensors' in packed
    assert not here - packed


# ---- imports

QUIET = '''
import importlib.util, os, random, sys
import bitsandbytes, datasets, matplotlib.pyplot, peft, scipy.stats, torch, transformers   # may do as they like
from lm_eval.models.huggingface import HFLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
if importlib.util.find_spec('ray'): import ray                                             # an extra
def refuse(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto', 'subprocess.Popen'):
        raise RuntimeError(f'{event} {args}')
sys.addaudithook(refuse)
def state():
    return {**os.environ, 'folder': os.getcwd(), 'random': random.getstate(), 'seed': torch.initial_seed(),
            'threads': torch.get_num_threads()}
sys.stdout.flush(); sys.stderr.flush()
print('OURS', flush=True); print('OURS', file=sys.stderr, flush=True)
for m in sys.argv[1:]:
    before = state()
    importlib.import_module(m)
    changed = [k for k, v in state().items() if before.get(k) != v]
    assert not changed, f'importing {m} changed {changed}'
'''


def test_importing_does_nothing(tmp_path):
    "No connection, no process, no output, no file, and environment, seeds and threads as they were."
    assert MODULES
    done = python('-c', QUIET, *MODULES, cwd=tmp_path)
    assert done.stdout.split('OURS\n')[1] == '' and done.stderr.split('OURS\n')[1] == ''
    assert not list(tmp_path.iterdir())


def test_light_modules_leave_torch_alone():
    code = (
        'import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m); print(m, [h for h in ("torch",'
        ' "transformers", "lm_eval") if h in sys.modules])'
    )
    assert python('-c', code, *LIGHT).stdout.splitlines() == [f'{m} []' for m in LIGHT]


# ---- notebooks

READ = {p.relative_to(ROOT / 'nbs').as_posix(): json.loads(p.read_text(encoding='utf-8')) for p in NOTEBOOKS}


def sources(nb: dict) -> list[str]:
    "Its code cells."
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']


def test_notebooks_have_one_form():
    wrong = []
    for name, nb in READ.items():
        first, ids = nb['cells'][0], [c['id'] for c in nb['cells']]
        lines = [s for s in ''.join(first['source']).splitlines() if s.strip()]
        if first['cell_type'] != 'markdown' or [s[:2] for s in lines] != ['# ', '> ']:
            wrong.append(f'{name}: the first cell is more or less than a title and one line')
        if nb['metadata']['kernelspec']['name'] != 'python3': wrong.append(f'{name}: its kernel is not python3')
        if len(ids) != len(set(ids)): wrong.append(f'{name}: cell ids repeat')
        if any('nbdev_export(' in s for s in sources(nb)):
            wrong.append(f'{name}: papermill would rewrite the library in mid-run')
    assert READ and not wrong, '\n'.join(wrong)


def test_notebooks_hold_no_path_of_a_machine():
    path = re.compile(r'(?<![\w.])/(?:home|root|work|Users|tmp|mnt|var/folders)/[\w.-]+')
    wrong = [f'{name}: {found[0]}' for name, nb in READ.items() if (found := path.search(json.dumps(nb)))]
    assert not wrong, '\n'.join(wrong)


def test_notebooks_draw_by_a_seed():
    "A check on numbers that nobody chose fails once in a while; one such stopped a run after nine minutes."
    drawn = re.compile(r'torch\.(?:randn|rand|randint|randperm)(?:_like)?\((?!.*generator=)|default_rng\(\)')
    wrong = []
    for name, nb in READ.items():
        seeded = False
        for line in '\n'.join(sources(nb)).splitlines():
            seeded = seeded or 'torch.manual_seed(' in line
            if not seeded and drawn.search(line): wrong.append(f'{name}: {line.strip()}')
    assert not wrong, '\n'.join(wrong)


def is_literal(stmt: ast.stmt) -> bool:
    try: return isinstance(ast.literal_eval(stmt.value), (str, int, float, type(None)))
    except (AttributeError, ValueError): return False


def test_parameters_of_notebooks():
    "papermill finds the profile by the cell's tag; without the tag the default would win, silently."
    wrong = []
    for name, nb in READ.items():
        cells = [c for c in nb['cells'] if c['cell_type'] == 'code']
        assigning = [c for c in cells if re.search(r'^profile *=', ''.join(c['source']), flags=re.M)]
        tagged = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
        if assigning != tagged or len(tagged) > 1: wrong.append(f'{name}: the cell of its profile has no tag')
        if re.match(r'0\d_', name) and not tagged:
            wrong.append(f'{name} is part of the story, which -p profile NAME chooses the scale of')
        body = [stmt for c in tagged for stmt in ast.parse(''.join(c['source'])).body]
        wrong += [f'{name}: {ast.unparse(s)}' for s in body if not isinstance(s, ast.Assign) or not is_literal(s)]
    assert not wrong, '\n'.join(wrong)


def test_imports_of_notebooks_stand_alone():
    "nbdev runs a cell that imports when it makes the site, so such a cell holds nothing else; and no star."
    wrong = []
    for name, nb in READ.items():
        for source in sources(nb):
            body = ast.parse(source).body
            imports = [s for s in body if isinstance(s, (ast.Import, ast.ImportFrom))]
            if len(imports) not in (0, len(body)): wrong.append(f'{name}: this cell imports and does more:\n{source}')
            if any(a.name == '*' for s in imports for a in s.names): wrong.append(f'{name}: {source}')
    assert not wrong, '\n'.join(wrong)


# ---- make and .venv

FAKE = '''#!/bin/sh
echo "$*" >>"{calls}"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "{fake}" "$3/bin/python" ;;
    "-m pip "*) echo "pip was here"; exit $(cat "{rc}") ;;
esac
'''


class Project:
    "A copy of what set-up needs, with a Python that only notes what it is asked to do."

    def __init__(self, folder: Path):
        self.folder, self.calls, self.rc = folder / 'project', folder / 'calls', folder / 'rc'
        (self.folder / 'tools').mkdir(parents=True)
        for name in ('Makefile', 'settings.ini', 'setup.py', 'tools/setup.sh'):
            shutil.copy(ROOT / name, self.folder / name)
        self.python = folder / 'python'
        self.python.write_text(FAKE.format(calls=self.calls, fake=self.python, rc=self.rc))
        self.python.chmod(0o755)
        self.rc.write_text('0')
        self.venv = self.folder / '.venv'

    def make(self, python=None, **env) -> tuple[list[str], subprocess.CompletedProcess]:
        "Run set-up; returns what it did (`venv`, `pip`) and how it ended. An empty `python` leaves the choice to it."
        self.calls.write_text('')
        env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'PYTHON')} | env
        named = self.python if python is None else python
        done = subprocess.run(
            ['make', '-C', str(self.folder), 'setup', f'PYTHON={named}'], env=env, capture_output=True, text=True
        )
        return re.findall(r'^-m (\w+)', self.calls.read_text(), flags=re.M), done


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_setup_is_done_once(project):
    assert project.make()[0] == ['venv', 'pip']
    steps, done = project.make()
    assert steps == [] and done.returncode == 0 and 'setup:' not in done.stdout


@pytest.mark.parametrize('name', ['settings.ini', 'setup.py'])
def test_changed_pins_are_installed(project, name):
    project.make()
    with (project.folder / name).open('a') as f:
        f.write('\n# changed\n')
    assert project.make()[0] == ['pip']
    assert project.make()[0] == []


def test_failed_install_is_shown_and_made_anew(project):
    project.rc.write_text('1')
    _, done = project.make()
    assert done.returncode != 0 and 'pip was here' in done.stderr and 'pip install failed' in done.stderr
    project.rc.write_text('0')
    steps, done = project.make()
    assert steps == ['venv', 'pip'] and done.returncode == 0


@pytest.mark.parametrize('damage', ['python', 'folder', 'stamp', 'moved'])
def test_half_made_venv_is_repaired(project, damage):
    project.make()
    if damage == 'python':                                   # whole by its stamp, but its Python does not start
        (project.venv / 'bin' / 'python').unlink()
    elif damage == 'folder':                                 # venv was stopped early
        shutil.rmtree(project.venv)
        (project.venv / 'bin').mkdir(parents=True)
    elif damage == 'stamp':  # somebody's own .venv: kept, and the pins installed into it
        (project.venv / 'stamp').unlink()
    elif damage == 'moved':                                  # scripts in it name the old folder
        project.folder = project.folder.rename(project.folder.with_name('elsewhere'))
    assert project.make()[0] == (['pip'] if damage == 'stamp' else ['venv', 'pip'])
    assert project.make()[0] == []


@pytest.mark.parametrize(
    'given, asked',
    [
        ([], "--profile 'tiny'"),
        (['PROFILE=mine.toml'], "--profile 'mine.toml'"),
        (['SEED=3'], "--profile 'tiny' --seed '3'"),
    ],
)
@pytest.mark.parametrize('target, program', [('tables', 'reports.notebooks '), ('demo', 'solar-repro demo ')])
def test_a_profile_keeps_its_own_seed(target, program, given, asked):
    "make hands on a profile, which the demo did not, and a seed only when it is told one."
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'SEED', 'PROFILE')}
    done = subprocess.run(
        ['make', '-n', '-C', str(ROOT), target, *given], env=env, capture_output=True, text=True, check=True
    )
    command, = [s for s in done.stdout.splitlines() if program in s]
    assert command.split(program)[1].strip() == asked


def test_missing_python_is_said(project):
    steps, done = project.make(python='python-that-is-not-there')
    assert steps == [] and done.returncode != 0
    assert "no 'python-that-is-not-there'" in done.stderr and 'PYTHON=' in done.stderr


def test_setup_takes_the_first_python_that_serves(project, tmp_path):
    "One that is too old, broken or without venv is passed over; which was taken is said."
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name, text in (('python3.11', '#!/bin/sh\nexit 1\n'), ('python3.12', project.python.read_text())):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    steps, done = project.make(python='', PATH=f'{folder}{os.pathsep}{os.environ["PATH"]}')
    assert done.returncode == 0 and steps == ['venv', 'pip'], done.stderr
    assert 'making .venv with python3.12' in done.stdout


def test_a_python_that_does_not_serve_is_refused(project, tmp_path):
    old = tmp_path / 'old'
    old.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\necho 3.10\n')
    old.chmod(0o755)
    steps, done = project.make(python=old)
    assert steps == [] and done.returncode != 0 and not project.venv.exists()
    assert f"'{old}' is Python 3.10" in done.stderr and '3.11 3.12 3.13' in done.stderr
