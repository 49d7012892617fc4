"The notebook runner: what runs, what is skipped, what a failure or an interruption leaves; and a run at smoke scale."

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from common import alive
from forked import Forked
from waiting import wait_for

from solar_repro.reports import notebooks as runner
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
INI = '[DEFAULT]\nlib_name = solar_repro\n'


def notebook(path: Path, *cells: str, parameters='') -> Path:
    made = [nbformat.v4.new_markdown_cell('# a title')]
    if parameters: made.append(nbformat.v4.new_code_cell(parameters, metadata=dict(tags=['parameters'])))
    nb = nbformat.v4.new_notebook(cells=made + [nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch, full) -> Path:
    "A project of two small notebooks that note when they run; all stages are built."
    (tmp_path/'settings.ini').write_text(INI)
    notebook(
        tmp_path / 'nbs' / '00_one.ipynb',
        "open('../ran.txt', 'a').write(f'one {profile} {seed}\\n')",
        parameters="profile = 'tiny'\nseed = 0",
    )
    notebook(tmp_path/'nbs'/'core'/'00_two.ipynb', "open('../../ran.txt', 'a').write('two\\n')", '1 + 1')
    notebook(tmp_path/'nbs'/'index.ipynb', 'raise RuntimeError("the front page is not run")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SOLAR_STORE', str(full))
    return tmp_path


def ran(project: Path) -> list[str]:
    "What ran since it was last asked."
    file = project/'ran.txt'
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


MAIN = 'import sys; from solar_repro.reports.notebooks import main; sys.exit(main(sys.argv[1:]))'


def start(cwd: Path, *args: str, code: Path = ROOT, **env: str) -> Forked:
    "`make notebooks` without the set-up; without --all, `make tables`."
    return Forked(MAIN, '--profile', 'smoke', *args, cwd=cwd, env={'PYTHONPATH': str(code), **env})


def run_notebooks(cwd: Path, *args: str, **how) -> subprocess.CompletedProcess:
    p = start(cwd, *args, **how)
    return subprocess.CompletedProcess(args, p.wait(), p.out, p.err)


@pytest.fixture
def without_stages(monkeypatch):
    "What a run would build is left out."
    monkeypatch.setattr(Experiment, 'run', lambda *args, **how: None)


# ---- which notebooks run

def test_story_order():
    nbs = [p.relative_to(ROOT/'nbs').as_posix() for p in runner.notebooks(ROOT/'nbs')]
    assert nbs[:7] == [
        f'0{i}_{n}.ipynb' for i, n in enumerate(('paper', 'data', 'sft', 'dpo', 'merge', 'eval', 'tables'))
    ]
    assert set(nbs) == {p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
                        if p.name != 'index.ipynb' and '.ipynb_checkpoints' not in p.parts}


def test_only_what_changed_runs_again(project, without_stages, capsys):
    "One test, so that the two notebooks are executed no more often than needed."
    out = project/'runs'/'smoke'/'notebooks'
    assert runner.run_notebooks('smoke', every=True) == [out/'00_one.ipynb', out/'core'/'00_two.ipynb']
    assert ran(project) == ['one smoke 0', 'two']
    said = capsys.readouterr().out
    assert '[1/2] 00_one.ipynb' in said and '[2/2] core/00_two.ipynb' in said and 'unchanged' not in said
    two = nbformat.read(out/'core'/'00_two.ipynb', 4)
    assert two.cells[-1].outputs[0]['data']['text/plain'] == '2'
    assert not [p for p in out.rglob('*') if '.part' in p.name or '.failed' in p.name]

    runner.run_notebooks('smoke', every=True)
    assert ran(project) == [] and capsys.readouterr().out.count('unchanged') == 2

    one = json.loads((project/'nbs'/'00_one.ipynb').read_text())
    one['cells'][1]['outputs'] = [dict(output_type='stream', name='stdout', text='new')]
    (project/'nbs'/'00_one.ipynb').write_text(json.dumps(one))
    runner.run_notebooks('smoke', every=True)
    assert ran(project) == []                                # outputs are no source

    one['cells'][-1]['source'] = "open('../ran.txt', 'a').write('changed\\n')"
    (project/'nbs'/'00_one.ipynb').write_text(json.dumps(one))
    runner.run_notebooks('smoke', every=True)
    assert ran(project) == ['changed']

    (out/'core'/'00_two.ipynb').write_text('{"cells": [')     # damaged
    runner.run_notebooks('smoke', every=True)
    assert ran(project) == ['two'] and nbformat.read(out/'core'/'00_two.ipynb', 4)

    (out/'00_one.ipynb').unlink()
    runner.run_notebooks('smoke', every=True)
    assert ran(project) == ['changed'] and (out/'00_one.ipynb').exists()

    (project/'solar_repro').mkdir(); (project/'solar_repro'/'new.py').write_text('x = 1')
    runner.run_notebooks('smoke', every=True)
    assert ran(project) == ['changed', 'two']                # the library is part of every fingerprint

    runner.run_notebooks('smoke', 3, every=True)
    assert ran(project) == ['changed', 'two'] and (project/'runs'/'smoke-seed3'/'notebooks'/'00_one.ipynb').exists()
    assert 'seed = 3' in (project/'runs'/'smoke-seed3'/'notebooks'/'00_one.ipynb').read_text()


def test_a_notebook_that_builds_shows_no_bar(project, without_stages):
    code = "from solar_repro.pipeline.experiment import Experiment\nExperiment('smoke', store='../own').run(['base'])"
    notebook(project/'nbs'/'00_one.ipynb', code)
    out, = runner.run_notebooks('smoke')
    assert nbformat.read(out, 4).cells[-1].outputs == [] and list((project/'own').glob('base/*'))


def test_stages_show_their_bars_on_a_terminal(project, monkeypatch):
    "What keeps bars out of notebooks kept them from the runner's own terminal, which then showed nothing for minutes."
    shown = []
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(Experiment, 'run', lambda *args, **how: shown.append(Progress([], {}).bar.disable))
    runner.run_notebooks('smoke')
    assert shown and not any(shown)


def test_a_notebook_that_somebody_executes_keeps_no_dead_bar(project):
    "A bar is a widget, of which a saved notebook could show but that it is gone."
    notebook(project/'nbs'/'00_one.ipynb', "from solar_repro.pipeline.experiment import Experiment\n"
             "Experiment('smoke', store='own').run(['base'])")
    papermill.execute_notebook('nbs/00_one.ipynb', 'OUT.ipynb', kernel_name='python3', progress_bar=False)
    outputs = nbformat.read('OUT.ipynb', 4).cells[-1].outputs
    assert [o.data for o in outputs] == [{'text/plain': ''}] and list((project/'own').glob('base/*'))


def test_results_that_left_the_store_are_made_again(project):
    "An executed notebook counts only as long as the store holds what it saw."
    exp = Experiment('smoke'); nb = project/'nbs'/'00_one.ipynb'
    record = dict(
        fingerprint=runner.fingerprint(nb, exp), output=runner._digest(nb), results={'data/openorca': 'abc'}, made={}
    )
    assert runner._unchanged(record, nb, nb, exp, {'data/openorca': 'abc', 'base': 'def'})
    assert not runner._unchanged(record, nb, nb, exp, {'data/openorca': 'other'})
    assert not runner._unchanged(record, nb, nb, exp, {})
    assert not runner._unchanged(None, nb, nb, exp, {})


def test_a_profile_of_ones_own_keeps_its_seed(project, without_stages):
    "Without --seed the profile's own holds, in the notebooks as in the run's folder."
    text = (ROOT/'solar_repro'/'profiles'/'smoke.toml').read_text(encoding='utf-8')
    own = project/'own.toml'
    own.write_text(re.sub('^seed = 0', 'seed = 5', text, flags=re.M).replace('name = "smoke"', 'name = "own"'))
    runner.run_notebooks('own.toml')                                # a path is meant from where one stands
    assert (project/'runs'/'own-seed5'/'notebooks'/'00_one.ipynb').exists()
    assert ran(project) == [f'one {own} 5']                         # the story alone


def test_a_file_of_a_shipped_profiles_name_is_not_taken_for_it(project, without_stages):
    "Whatever lay there under that name was read as the profile, by the notebooks alone."
    (project/'smoke').touch()
    runner.run_notebooks('smoke')
    assert ran(project) == ['one smoke 0']


# ---- failures

def test_a_failing_notebook(project):
    "Exit status 1, a traceback, the notebook as far as it came; the next run goes on there."
    bad = notebook(project/'nbs'/'core'/'00_two.ipynb', "print('got here')", 'def f(): return 1/0', 'f()')
    done = run_notebooks(project, '--all')
    failed = project/'runs'/'smoke'/'notebooks'/'core'/'00_two.failed.ipynb'
    assert done.returncode == 1, done.stderr
    assert 'ZeroDivisionError' in done.stderr and 'f()' in done.stderr and '*.failed.ipynb' in done.stderr
    assert 'got here' in failed.read_text() and not failed.with_name('00_two.ipynb').exists()
    assert ran(project) == ['one smoke 0']
    notebook(bad, "open('../../ran.txt', 'a').write('two\\n')")
    done = run_notebooks(project, '--all')
    assert done.returncode == 0 and ran(project) == ['two'] and not failed.exists()


@pytest.mark.parametrize('args,message', [(['--profile', 'smok'], 'smoke'), (['--seed', '-1'], 'seed')])
def test_unusable_arguments(project, args, message):
    done = run_notebooks(project, *args)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert ran(project) == []


# ---- interruptions

@pytest.mark.parametrize('how', ['Ctrl-C', 'SIGINT to the runner alone', 'kill -9'])
def test_interrupted(project, how):
    "Ctrl-C reaches every process of the terminal, `kill -INT` the one; either way the next run goes on."
    slow = notebook(
        project / 'nbs' / 'core' / '00_two.ipynb',
        "import os, time\nopen('../../pid.txt', 'w').write(str(os.getpid()))\ntime.sleep(3600)",
    )
    p = start(project, '--all')
    try:
        kernel = int(wait_for(lambda: (project/'pid.txt').exists() and (project/'pid.txt').read_text(), p))
        time.sleep(.5)
        if how == 'Ctrl-C':os.killpg(p.pid, signal.SIGINT)
        else: p.send_signal(signal.SIGINT if how.startswith('SIGINT') else signal.SIGKILL)
        _, err = p.communicate()
        if how == 'kill -9':assert p.returncode == -signal.SIGKILL
        else: assert p.returncode == 130 and 'interrupted' in err and 'again' in err and 'Traceback' not in err, err
        wait_for(lambda: not alive(kernel))                          # it does not outlive the runner
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL); p.communicate()
    assert ran(project) == ['one smoke 0'] and not (project/'runs'/'smoke'/'notebooks'/'core'/'00_two.ipynb').exists()
    notebook(slow, "open('../../ran.txt', 'a').write('two\\n')")
    done = run_notebooks(project, '--all')
    assert done.returncode == 0, done.stderr
    assert ran(project) == ['two'] and '00_one.ipynb: unchanged' in done.stdout


def test_the_machinery_goes_two_at_a_time_and_is_interrupted_together(project):
    "Two notebooks wait for each other; an interrupt of the runner alone ends both, and a third has not begun."
    meet = """import os, pathlib, time
open(f'../../{{}}.pid', 'w').write(str(os.getpid()))
end = time.time() + 3600
while not pathlib.Path('../../{}.pid').exists(): assert time.time() < end; time.sleep(.05)
open('../../{{}}.met', 'w').close(); time.sleep(3600)"""
    for a, b in (('00_two', '01_three'), ('01_three', '00_two')):
        notebook(project / 'nbs' / 'core' / f'{a}.ipynb', meet.format(b).replace('{}', a))
    notebook(project/'nbs'/'tiny'/'00_four.ipynb', "open('../../ran.txt', 'a').write('four\\n')")
    p = start(project, '--all')
    try:
        wait_for(lambda: len(list(project.glob('*.met'))) == 2, p)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate()
        assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err, err
        wait_for(lambda: not any(alive(int(f.read_text())) for f in project.glob('*.pid')))
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL); p.communicate()
    assert ran(project) == ['one smoke 0'] and [
        x.name for x in (project / 'runs' / 'smoke' / 'notebooks').rglob('0*.ipynb') if 'failed' not in x.name
    ] == ['00_one.ipynb']


# ---- all of it, at smoke scale

class Smoke:
    "A copy of the project, its store, and the first `--profile smoke` run in it: of the story, or of all notebooks."
    def __init__(self, folder: Path, store: Path, *args: str):
        self.code, self.store = folder/'clone', store
        for d in ('nbs', 'solar_repro'):
            shutil.copytree(ROOT / d, self.code / d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        shutil.copy(ROOT/'settings.ini', self.code)
        self.before = self.files()
        self.missing = (Experiment('smoke', store=store).status()['state'] == 'missing').sum()
        self.first = subprocess.run(
            [sys.executable, '-m', 'solar_repro.reports.notebooks', '--profile', 'smoke', *args],
            cwd=self.code, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, 'PYTHONPATH': str(self.code), 'SOLAR_STORE': str(store)})
        self.out = self.code/'runs'/'smoke'

    def run(self): return run_notebooks(self.code, code=self.code, SOLAR_STORE=str(self.store))

    def files(self) -> dict[Path, bytes]:
        return {
            p: p.read_bytes()
            for d in ('nbs', 'solar_repro')
            for p in (self.code / d).rglob('*')
            if p.is_file() and '__pycache__' not in p.parts
        }

    def papermill(self, cwd: Path, nb: str, store: Path) -> nbformat.NotebookNode:
        "What one types to run a single notebook; OUT.ipynb lands in the folder one stands in."
        cwd.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, '-m', 'papermill', nb, 'OUT.ipynb', '-p', 'profile', 'smoke'],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            env={**os.environ, 'PYTHONPATH': str(self.code), 'SOLAR_STORE': str(store)},
        )
        assert done.returncode == 0 and 'unknown parameter' not in done.stderr.lower(), done.stderr[-3000:]
        return nbformat.read(cwd/'OUT.ipynb', 4)


@pytest.fixture(scope='module')
def smoke(full, tmp_path_factory):
    "`make tables`, where a merge and its scores are still to be built."
    folder = tmp_path_factory.mktemp('smoke')
    store = shutil.copytree(full, folder/'store')
    for a in Experiment('smoke', store=store).store.entries():
        if 'Merge v4' in a.manifest['name']: shutil.rmtree(a.path)
    return Smoke(folder, store)


def holds(smoke: Smoke, nbs: list[Path]) -> None:
    "A run built stages, executed these notebooks and no others, and left the sources as they were."
    assert smoke.first.returncode == 0, smoke.first.stderr[-3000:]
    executed = {p.relative_to(smoke.out/'notebooks') for p in (smoke.out/'notebooks').rglob('*.ipynb')}
    assert executed == {p.relative_to(ROOT/'nbs') for p in nbs}
    said = smoke.first.stdout
    assert f'[{len(nbs)}/{len(nbs)}]' in said and 'report.html' in said
    stages = {line.partition(',')[0] for line in smoke.first.stderr.splitlines() if line.startswith('stage ')}
    assert len(stages) == smoke.missing and 'Traceback' not in smoke.first.stderr      # by the runner
    for nb in executed:
        shown = str([c.get('outputs') for c in nbformat.read(smoke.out/'notebooks'/nb, 4).cells])
        assert not re.search(r'stage \d+ of \d+', shown), nb
    assert smoke.files() == smoke.before


def test_the_story_makes_the_tables(smoke):
    holds(smoke, [p for p in runner.notebooks(ROOT/'nbs') if p.parent == ROOT/'nbs' and p.stem != '07_your_own'])


@pytest.mark.slow
def test_every_notebook_runs_from_nothing(tmp_path):
    "`make notebooks`; that each runs, `nbdev_test` has shown."
    holds(Smoke(tmp_path, tmp_path/'store', '--all'), runner.notebooks(ROOT/'nbs'))


@pytest.mark.parametrize('n,rows', [(3, 5), (4, 3), (5, 2), (6, 2), (7, 4)])
def test_tables_of_the_run(n, rows, smoke):
    tasks = ['h6', 'arc', 'hellaswag', 'mmlu', 'truthfulqa', 'winogrande', 'gsm8k']
    with open(smoke.out/'tables'/f'table{n}.csv', newline='') as f: head, *body = csv.reader(f)
    assert (
        head[:22] == ['model', *tasks, *(f'{t}_se' for t in tasks), *(f'{t}_paper' for t in tasks)]
        and len(body) == rows
    )
    assert all(re.fullmatch(r'\d+\.\d\d', x) and float(x) <= 100 for r in body for x in r[1:])
    assert all((smoke.out/'tables'/f'table{n}.{e}').stat().st_size for e in ('html', 'md', 'tex'))


def test_figures_and_report_of_the_run(smoke):
    figures = sorted(p.name for p in (smoke.out/'figures').iterdir())
    assert figures == ['claims.png', *(f'table{n}.png' for n in range(3, 8))]
    page = (smoke.out/'report.html').read_text(encoding='utf-8')
    assert page.count('data:image/png;base64,') == 6 and 'smoke test' in page and 'eval/Merge v4/gsm8k' in page


def test_a_second_run_finds_everything(smoke):
    tables = {p.name: p.read_bytes() for p in (smoke.out/'tables').iterdir()}
    again = smoke.run()
    n = len(list((smoke.out/'notebooks').rglob('*.ipynb')))
    assert (
        again.returncode == 0 and again.stdout.count(': unchanged') == n and 'stage' not in again.stderr
    ), again.stdout + again.stderr
    assert {p.name: p.read_bytes() for p in (smoke.out/'tables').iterdir()} == tables


@pytest.mark.slow
def test_deleted_tables_come_back(smoke):
    "Tables and report are results as much as the executed notebooks are."
    shutil.rmtree(smoke.out/'tables'); (smoke.out/'report.html').unlink()
    again = smoke.run()
    assert again.returncode == 0 and (smoke.out/'tables'/'table7.csv').exists() and (smoke.out/'report.html').exists()
    assert 'stage' not in again.stderr                       # nothing is computed anew


def shown(nb: nbformat.NotebookNode) -> list[str]:
    "What the cells of an executed notebook gave."
    given = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'execute_result']
    return [re.sub(' at 0x[0-9a-f]+', '', o.data['text/plain']) for o in given]


@pytest.mark.slow
def test_one_notebook_alone_on_a_full_store(smoke, tmp_path):
    "From another folder, and with the tables that it printed when the run built them."
    full = smoke.papermill(tmp_path/'elsewhere', str(smoke.code/'nbs'/'04_merge.ipynb'), smoke.store)
    first = nbformat.read(smoke.out/'notebooks'/'04_merge.ipynb', 4)
    assert shown(full) == shown(first) and any('Merge v4' in x for x in shown(full))
    assert [p.name for p in (tmp_path/'elsewhere').iterdir()] == ['OUT.ipynb']


@pytest.mark.slow
def test_one_notebook_alone_on_an_empty_store(smoke, tmp_path):
    "Bit for bit the tables of a store that another run has filled."
    empty = smoke.papermill(smoke.code, 'nbs/04_merge.ipynb', tmp_path/'empty')
    assert shown(empty) == shown(nbformat.read(smoke.out/'notebooks'/'04_merge.ipynb', 4))
