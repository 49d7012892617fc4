"What somebody meets who has just come: commands that say where, how much and what to do; the line between two models."
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from solar_repro.paper import MEASURED, TITLES
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.sweep import between, is_built, sweep
from solar_repro.publishing.text import printed, write_tables
from solar_repro.reports import commands
from solar_repro.reports.cli import main
from solar_repro.tables import CONTRADICTED, SUPPORTED, verdicts_on_paper

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('set_to', [None, ''])
def test_outside_a_clone_nothing_long_is_built_unasked(set_to, tmp_path, monkeypatch, capsys):
    "A SOLAR_STORE that was set to nothing counted as a place that somebody had named."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('SOLAR_STORE', raising=False)
    if set_to is not None: monkeypatch.setenv('SOLAR_STORE', set_to)
    assert main(['table', '5']) == 2
    said = capsys.readouterr().err
    assert '--yes' in said and str(tmp_path/'runs'/'store') in said, said
    assert not list((tmp_path/'runs'/'store').glob('sft*'))


def test_refused_results_leave_no_folder(tmp_path, monkeypatch, capsys):
    "An empty one was left, and it was said first that something was being written."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('SOLAR_STORE', raising=False)
    assert main(['results', 'new']) == 2
    said = capsys.readouterr().err
    assert '--yes' in said and 'writing' not in said and not (tmp_path/'new').exists()


@pytest.mark.parametrize('words', [['SFT v3'], ['SFT v3', 'gsm8k']])
def test_what_is_shown_is_not_trained_unasked(words, tmp_path, monkeypatch, capsys):
    "In a clone, or with a store named, show trained for minutes; what is quickly made is made."
    monkeypatch.chdir(tmp_path)
    there = ['--store', str(tmp_path/'store')]
    assert main(['show', *words, *there]) == 2
    said = capsys.readouterr().err
    assert 'show is to look at what is there' in said and '--yes' in said, said
    assert not list((tmp_path/'store').glob('*/*/manifest.json'))
    assert main(['show', 'data/openorca', *there]) == 0
    assert json.loads(capsys.readouterr().out)['kind'] == 'data'


def test_what_made_a_recorded_score_is_shown_and_what_two_models_said(tmp_path, capsys):
    store = ['--recorded', '--store', str(tmp_path/'none')]
    recorded = Experiment('tiny', recorded=True).repeated()[0]
    assert main(['show', 'Merge v4', 'gsm8k', *store]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    score = recorded.scores(['Merge v4'], ['gsm8k'])['score'].item()
    assert f'{100*score:.2f} %' in said and 'recorded, seed 0' in said and 'SFT v3 + v4' in said
    assert main(['show', 'Merge v4', *store]) == 0
    stage = recorded.provenance().set_index('stage').loc['Merge v4']
    assert json.loads(capsys.readouterr().out)['content'] == stage['content']
    assert main(['diff', 'DPO v1', 'DPO v2', '--task', 'gsm8k', *store]) == 0
    said = capsys.readouterr().out
    assert 'recorded, seed 0' in ' '.join(said.split()) and said.count('right: ') == len(
        recorded.flips('DPO v1', 'DPO v2', 'gsm8k')) > 0


def test_importing_says_nothing():
    "On processors with AVX512-BF16 every command began with a remark of bitsandbytes about a kernel of the Hub."
    assert not logging.getLogger('bitsandbytes.backends.cpu.ops').isEnabledFor(logging.WARNING)


def test_make_keeps_what_python_compiles(tmp_path):
    "An image of a container forbade it, and set-up compiles nothing: each process compiled torch again, for a minute."
    (tmp_path/'show.mk').write_text(f'include {ROOT}/Makefile\nshow: ; @echo "[$$PYTHONDONTWRITEBYTECODE]"\n')
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE='1')
    words = ['make', '--no-print-directory', '-f', tmp_path/'show.mk', 'show']
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stdout + done.stderr


def test_a_table_fits_a_terminal_and_says_what_the_report_says(tmp_path, monkeypatch, capsys):
    "It was one line of 21 columns, without marks and without what is best or resolved."
    monkeypatch.setenv('COLUMNS', '80')
    report = Experiment('tiny', recorded=True)
    for n in (3, 7):
        assert main(['table', str(n), '--recorded', '--store', str(tmp_path/'none')]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and '\x1b' not in out
        cells = report.table(n).to_dict('records')
        for row in cells:
            for task in TITLES: assert f'{row[task]:.2f}' in out and f'({row[f"{task}_paper"]:.2f}' in out
        best = {task: max(r[task] for r in cells) for task in TITLES}
        for task, x in best.items(): assert re.search(rf'{x:.2f}[*≈]±', out), task
        assert set(re.findall('[○✗]', out)) == ({'○', '✗'} if n == 3 else set())
    assert 'SLERP' in out and report.label in ' '.join(out.split())


@pytest.mark.parametrize('isatty, env, bold', [(True, dict(TERM='xterm'), True), (False, dict(TERM='xterm'), False),
                                               (True, dict(TERM='dumb'), False),
                                               (True, dict(TERM='xterm', NO_COLOR='1'), False)])
def test_the_best_of_a_column_is_bold_where_a_terminal_can(isatty, env, bold, tmp_path, monkeypatch, capsys):
    "Elsewhere it has a star, and the sentence below says which of the two it is."
    for k in ('TERM', 'NO_COLOR'): monkeypatch.delenv(k, raising=False)
    for k, v in (env | dict(COLUMNS='80')).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: isatty)
    assert main(['table', '5', '--recorded', '--store', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    best = Experiment('tiny', recorded=True).table(5)['h6'].max()
    assert (f'\x1b[1m{best:.2f}\x1b[0m' in out) == bold and (f'{best:.2f}*' in out) != bold
    assert ('best of each column in bold' in ' '.join(out.split())) == bold
    assert max(len(re.sub(r'\x1b\[\d+m', '', x)) for x in out.splitlines()) <= 80


@pytest.mark.parametrize('words', [
    ['status'], ['plan'], ['plan', '--actual'], ['doctor'], ['claims'], ['show', 'Merge v4', 'gsm8k'], ['verify'],
    ['contamination'], ['diff', 'base', 'DPO v2', '--task', 'truthfulqa'], ['results', 'new'], ['base'],
    ['sweep', 'Cand. 1', 'Cand. 2', '--points', '3']], ids=' '.join)
def test_what_is_printed_fits_a_terminal(full, words, tmp_path, monkeypatch, capsys):
    "plan was 129 columns wide, what doctor says 168, a lineage 151, items of diff 162, a hash of the base 89."
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.chdir(tmp_path)
    assert main([*words, *([] if words == ['base'] else ['--profile', 'smoke', '--store', str(full)])]) == 0
    out = capsys.readouterr().out
    lines = [x for x in out.splitlines() if str(full) not in x and str(tmp_path) not in x]      # a path stays one word
    assert lines and max(map(len, lines)) <= 80
    assert words != ['base'] or 'weights' in json.loads(out), 'what is for a program stays so'


@pytest.mark.parametrize('is_terminal', [True, False])
def test_what_takes_long_says_on_a_terminal_what_it_does(is_terminal, monkeypatch, capsys):
    "doctor, diff and whatever read the recorded runs were silent for seconds."
    monkeypatch.setattr(commands, 'PATIENCE_S', .01)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: is_terminal)
    said = []

    def doctor():
        "Look at nothing until somebody has been told."
        while any(isinstance(t, threading.Timer) for t in threading.enumerate()): time.sleep(.01)
        said.append(capsys.readouterr().err)
    monkeypatch.setitem(commands.COMMANDS, 'doctor', doctor)
    assert main(['doctor']) == 0 and capsys.readouterr().err == ''
    line, = said
    assert line == (f'solar-repro is at work: {doctor.__doc__}\n' if is_terminal else '')


def test_what_says_that_it_builds_says_nothing_else(tmp_path, monkeypatch, capsys):
    "The line would stand in the middle of the bars; and a command that ends sooner leaves nothing that waits."
    monkeypatch.setattr(commands, 'PATIENCE_S', 3600)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    waits = lambda: [t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()]
    seen = []

    def doctor(exp):
        "Build a set of rows."
        before = waits()
        exp.build('data/openorca')
        seen.append((before, waits()))
    monkeypatch.setitem(commands.COMMANDS, 'doctor', doctor)
    assert main(['doctor', '--profile', 'smoke', '--store', str(tmp_path)]) == 0
    (before, after), = seen
    assert len(before) == 1 and after == [] and waits() == []
    assert 'missing of profile smoke' in capsys.readouterr().err


@pytest.mark.parametrize('columns', ['1', '2'])
def test_a_terminal_too_narrow_for_anything_is_no_fault(columns, tmp_path, monkeypatch, capsys):
    "Every command lays out its help first, and of 1 or 2 columns none or less were left for it."
    monkeypatch.setenv('COLUMNS', columns)
    assert main(['status', '--profile', 'smoke', '--store', str(tmp_path/'none')]) == 0
    with pytest.raises(SystemExit) as e: main(['status', '--help'])
    assert e.value.code == 0, capsys.readouterr().err


def test_a_recorded_table_is_of_the_seed_that_was_asked_for(tmp_path, capsys):
    assert main(['table', '5', '--recorded', '--seed', '1', '--store', str(tmp_path/'none')]) == 0
    assert 'seed 1' in capsys.readouterr().out
    assert main(['table', '5', '--recorded', '--seed', '99', '--store', str(tmp_path/'none')]) == 2
    assert main(['show', 'quantization/SFT v3', '--recorded', '--store', str(tmp_path/'none')]) == 2  # of no record


def test_a_table_comes_in_the_formats_of_the_files(full, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['table', '5', '--profile', 'smoke', '--store', str(full), '--format']
    exp = Experiment('smoke', store=full)
    write_tables(exp.scores(), tmp_path, exp.label, exp.custom, exp.samples())
    for kind in ('md', 'csv', 'tex', 'html'):
        assert main([*words, kind]) == 0
        assert capsys.readouterr().out.strip() == (tmp_path/f'table5.{kind}').read_text(encoding='utf-8').strip()
    assert main([*words, 'json']) == 0
    told = json.loads(capsys.readouterr().out)
    assert [r['h6'] for r in told['rows']] == list(exp.table(5)['h6'])
    shown = printed(5, exp.scores(), 'md', exp.custom[5], exp.samples())
    assert set(told['not_resolved']) == {t for t, title in TITLES.items() if shown[title].str.contains('≈').any()}
    with pytest.raises(SystemExit): main([*words, 'xml'])
    assert "'md'" in capsys.readouterr().err


def test_names_of_models_are_offered_and_a_table_is_a_picture():
    exp = Experiment('tiny', recorded=True)
    assert exp._ipython_key_completions_() == exp.models and 'Merge v4' in exp.models
    fig, other = exp.plot(3), exp.plot(4)
    names = lambda f: [t.get_text() for t in f.axes[0].get_yticklabels()]
    assert names(fig) == list(exp.table(3)['model']) and names(other) == list(exp.table(4)['model'])


def test_where_the_line_is_asked_at_the_papers_points_nothing_new_is_built(full, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exp = Experiment('smoke', store=full)
    assert exp.profile.merge.slerp_t == .5
    before = {a.path for a in exp.store.entries()}
    assert main(['sweep', 'Cand. 1', 'Cand. 2', '--points', '3', '--profile', 'smoke', '--store', str(full)]) == 0
    assert {a.path for a in exp.store.entries()} == before
    out = capsys.readouterr().out
    assert 'distinguished from it' in ' '.join(out.split()) and Path(out.splitlines()[-1]).stat().st_size > 10_000
    m, scores = sweep(exp, 'Cand. 1', 'Cand. 2', 3), exp.scores().set_index(['model', 'task'])['score']
    gsm8k = m[m['task'] == 'gsm8k'].set_index(['method', 'weight'])['score']
    theirs = {('linear', 0.): 'Cand. 2', ('linear', .5): 'Merge v1', ('slerp', .5): 'Merge v4',
              ('slerp', 1.): 'Cand. 1'}
    assert {k: gsm8k[k] for k in theirs} == {k: scores[name, 'gsm8k'] for k, name in theirs.items()}


def test_a_line_is_built_only_when_all_of_it_is(full):
    exp = Experiment('smoke', store=full)
    assert is_built(*between(exp, 'Cand. 1', 'Cand. 2', 3)) and not is_built(*between(exp, 'SFT v1', 'SFT v2', 3))


@pytest.mark.parametrize('words, says', [(['Cand. 1', 'Cand. 1'], 'two models'),
                                         (['Cand. 1', 'Cand 3'], 'did you mean'),
                                         (['Cand. 1', 'Cand. 2', '--points', '4'], 'an odd number')])
def test_a_line_that_cannot_be_is_refused_in_one_line(words, says, tmp_path, capsys):
    assert main(['sweep', *words, '--profile', 'smoke', '--store', str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1, said


def test_init_says_where_notebooks_and_results_lie(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['init', 'my solar']) == 0
    out = capsys.readouterr().out
    assert str(tmp_path/'my solar'/'nbs') in out and str(tmp_path/'my solar'/'runs') in out and "cd 'my solar'" in out


def test_status_of_nothing_says_what_is_missing(tmp_path, monkeypatch, capsys):
    "It builds nothing, writes nothing, and of what has no seconds it says no None."
    monkeypatch.chdir(tmp_path)
    assert main(['status', '--profile', 'smoke', '--store', 'store']) == 0
    out = capsys.readouterr().out
    first, *rows, last = out.splitlines()
    assert first.split() == ['stage', 'kind', 'state', 'seconds'] and 'None' not in out and 'NaN' not in out
    assert rows and all(' missing ' in f'{r} ' for r in rows)
    assert last.startswith(f'0 of {len(rows)} stages of profile smoke are in ') and not list(tmp_path.iterdir())


def test_status_and_plan_say_of_which_seeds_they_speak(full, tmp_path, capsys):
    "They named all seeds of the profile and counted the stages of one."
    (tmp_path/'mine.toml').write_text('extends = "smoke"\nseeds = [0, 1]\n')
    where = ['--profile', str(tmp_path/'mine.toml'), '--store', str(full)]
    assert main(['status', *where]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    n = len(Experiment('smoke').graph)
    assert first.startswith(f'{n} of {n} stages of profile mine, seed 0 (above), are in')
    built = int(second.split()[0])
    assert 0 < built < n and second.startswith(f'{built} of {n} stages of profile mine, seed 1, are in')
    assert main(['status', *where, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['built_by_seed'] == {'0': n, '1': built}
    assert main(['plan', *where]) == 0
    assert 'of seed 0 alone. Still to do, seed 0: 0 s, seed 1: ' in ' '.join(capsys.readouterr().out.split())
    assert main(['plan', *where, '--json']) == 0
    left = json.loads(capsys.readouterr().out)['hours_left_by_seed']
    assert left['0'] == 0 < left['1']


def test_addresses_are_those_of_settings():
    "The placeholders stand in one place; README, citation and badges follow it."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    c = ini['DEFAULT']
    repo, branch = f'{c["user"]}/{c["repo"]}', c['branch']
    assert c['git_url'] == f'https://github.com/{repo}'
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    found = re.findall(r'https://(?:colab\.research\.google\.com/github|mybinder\.org/v2/gh)/([^)\s]+)', readme)
    assert len(found) == 2 and all(x.startswith(repo) and branch in x for x in found), found
    for x in found: assert (ROOT/re.search(r'nbs.*', unquote(x))[0]).is_file(), x
    ours = re.findall(r'https://github\.com/[^\s)`}]*solar-repro[^\s)`}]*', readme)        # clone, pip, BibTeX
    assert len(ours) > 2 and all(x.startswith(c['git_url']) for x in ours), ours
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert (cff['repository-code'], cff['version'], cff['cff-version']) == (c['git_url'], c['version'], '1.2.0')
    names = [f'{a["given-names"]} {a["family-names"]}' for a in cff['references'][0]['authors']]
    assert ' and '.join(names) in ' '.join(readme.split()), 'the same authors as the BibTeX of the front page'


def test_binder_installs_what_is_pinned():
    ini = (ROOT/'settings.ini').read_text(encoding='utf-8')
    lines = (ROOT/'binder'/'requirements.txt').read_text().splitlines()
    pins = [x for x in lines if '==' in x]
    assert len(pins) == 1 and pins[0] in ini and '-e .' in lines
    assert (ROOT/'binder'/'runtime.txt').read_text().strip() == 'python-3.11'
    assert os.access(ROOT/'binder'/'postBuild', os.X_OK)
    assert subprocess.run(['sh', '-n', ROOT/'binder'/'postBuild']).returncode == 0


def test_what_binder_runs_after_its_installation_runs(tmp_path):
    "Its commands, on this environment: they need no network. What it installs is this package."
    env = os.environ | dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', PYTHONPATH=str(ROOT))
    done = subprocess.run(['sh', ROOT/'binder'/'postBuild'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'can run tiny' in ' '.join(done.stdout.split()), done.stderr
    assert not list((tmp_path/'runs').glob('store/*')), 'nothing is trained while the image is built'
    named = subprocess.run([sys.executable, 'setup.py', '--name'], cwd=ROOT, env=env, capture_output=True, text=True)
    assert named.stdout.split() == ['solar_repro']


PIP_SAYS = """Obtaining file:///home/somebody/solar-repro
Collecting torch==2.13.0 (from solar_repro==0.1.0)
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (29 kB)
Downloading https://files.example.org/a/b/torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.9 MB)
Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)
Downloading regex-2026.1-cp311-cp311-manylinux_2_28_x86_64.whl (8.2 MB)
   ---------------------------------------- 8.2/8.2 MB 90.1 MB/s  0:00:00
Downloading transformers-5.23.0-py3-none-any.whl (10.4 MB)
Using cached scipy-1.17.0-cp311-cp311-manylinux_2_28_x86_64.whl (35.1 MB)
Installing collected packages: six, torch, transformers
Successfully installed six-1.17.0 torch-2.13.0 transformers-5.23.0
"""


def test_set_up_says_the_large_files_as_they_come():
    "What tools/setup.sh makes of pip's words: files of ten megabytes and more with their size, then that it unpacks."
    program, = re.findall(r"\| awk '(.*?)'$", (ROOT/'tools'/'setup.sh').read_text(), flags=re.S | re.M)
    said = subprocess.run(['awk', program], input=PIP_SAYS, capture_output=True, text=True)
    assert said.stdout.splitlines() == [
        'setup:   torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.9 MB)',
        'setup:   transformers-5.23.0-py3-none-any.whl (10.4 MB)', 'setup:   unpacking'], said.stderr


def test_front_page_says_what_the_papers_numbers_tell():
    readme = ' '.join((ROOT/'README.md').read_text(encoding='utf-8').split())
    verdicts = verdicts_on_paper()
    n = {noise: (verdicts[noise] == SUPPORTED).sum() for noise in ('items', 'recipe')}
    none = not (verdicts['items'] == CONTRADICTED).any() and n['recipe'] == 0
    assert none and f'they support {n["items"]} of the text\'s {len(verdicts)} claims and contradict none' in readme
    assert f'none of the {n["items"]} is left' in readme
    of = {m: [x.scores for x in MEASURED if x.of == m] for m in ('solar', 'zephyr-dpo')}
    (h6, *_, gsm8k), (h6_again, *_, gsm8k_again) = of['solar'][1:]
    assert f'H6 by {h6_again - h6:.2f} and GSM8K by {gsm8k_again - gsm8k:.2f}' in readme
    assert f'lie {of["zephyr-dpo"][0][0] - of["zephyr-dpo"][1][0]:.2f} apart' in readme


def test_front_page_goes_from_what_was_found_to_two_commands_a_table_and_its_picture():
    "Six paragraphs of what it is not and what it needs stood before the first command, and no table stood open."
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    order = ['**In short.**', '```sh', '| Model ', '<img src="nbs/recorded/table', '<summary>', '## What was found',
             '## What it is not', '## What the commands need and leave']
    assert order == sorted(order, key=readme.index)
    first = readme[readme.index('```sh'):].split('```')[1]
    assert re.findall(r'^make (\w+)', first, flags=re.M) == ['demo', 'tables']
    times = readme[readme.index('set-up included, `make'):].split('.')[0]
    assert re.findall('`make (demo|tables|test)` took', times) == ['demo', 'tables', 'test']


def test_make_lab_tells_root_what_to_do(tmp_path):
    fake = tmp_path/'id'
    fake.write_text('#!/bin/sh\necho 0\n')
    fake.chmod(0o755)
    env = os.environ | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}')
    shown = subprocess.run(['make', '-n', '--no-print-directory', 'lab'], cwd=ROOT, capture_output=True, text=True)
    recipe = shown.stdout
    asks = recipe[recipe.index('if ['):recipe.rindex('.venv/bin/python -m jupyterlab')]
    said = subprocess.run(['sh', '-c', asks], env=env, capture_output=True, text=True)
    assert said.returncode == 1 and 'make lab ROOT=1' in said.stdout
    fake.write_text('#!/bin/sh\necho 1000\n')
    assert subprocess.run(['sh', '-c', asks], env=env).returncode == 0


@pytest.mark.parametrize('closed', [pytest.param('<&- >&-', marks=pytest.mark.slow),
                                    pytest.param('2>&-', marks=pytest.mark.slow), '<&- >&- 2>&-'])
def test_workers_start_without_streams_and_beside_modules_named_as_pythons(closed, full, tmp_path):
    "The first file that was opened took a closed stream's number; a folder's secrets.py was taken for Python's."
    for name in ('secrets', 'queue', 'random'): (tmp_path/f'{name}.py').write_text('API_TOKEN = "x"')
    for a in Experiment('smoke', store=shutil.copytree(full, tmp_path/'store')).store.entries():
        if a.manifest['name'] in ('eval/SFT v1/arc', 'eval/SFT v2/arc'): shutil.rmtree(a.path)
    command = f'{Path(sys.executable).parent}/solar-repro run --profile smoke --workers 2 --store store {closed}'
    done = subprocess.run(['sh', '-c', command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'runs'/'smoke'/'report.html').is_file()


@pytest.mark.parametrize('stream,words,status', [
    ('stderr', 'run --profile smoke --store store', 1), ('stdout', 'table 3 --recorded', 0)])
def test_a_reader_that_goes_ends_a_table_well_and_work_not(stream, words, status, tmp_path):
    "`| head` has what it wanted; a run that could not say how far it is was taken for a whole one."
    command = [Path(sys.executable).parent/'solar-repro', *words.split()]
    with subprocess.Popen(command, cwd=tmp_path, **{stream: subprocess.PIPE}) as p: getattr(p, stream).close()
    assert p.returncode == status
