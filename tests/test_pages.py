"What people meet: README's commands, notebooks in Jupyter, rows of one's own, the wheel."

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from common import ENV, NOTEBOOKS, ROOT, run
from forked import forked, HELD
from waiting import wait_for

from solar_repro.core.config import load_profile
from solar_repro.stages.graph import build_graph
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.progress import headline

ALPACA = [dict(prompt=f'What is {a} times 2?', completion=f'{2 * a}') for a in range(12)]


# ---- stored outputs

def test_kept_outputs_are_those_of_every_execution(tmp_path, monkeypatch):
    "What differs between executions is not kept; pictures are small; what did not run is not touched."
    import base64, io
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import keep_outputs
    fig, ax = plt.subplots(figsize=(6, 3))
    ax.plot([1, 3, 2], label='loss')
    ax.legend()
    f = io.BytesIO()
    fig.savefig(f, format='png')
    plt.close(fig)
    png, new = base64.b64encode(f.getvalue()).decode(), nbformat.v4.new_output

    def executed(k):
        cell = nbformat.v4.new_code_cell('show()', id='a')
        said = f'in {keep_outputs.tempfile.gettempdir()}/tmp{k}abc| and {ROOT}/runs/store\n'   # cut on its way, or not
        cell.outputs = [
            new('stream', name='stderr', text=f'step {k}'),
            new('display_data', {keep_outputs.WIDGET: dict(model_id=k), 'text/plain': 'Writing: 0%|'}),
            *(new('stream', name='stdout', text=x) for x in (said.split('|') if k == '2' else [said.replace('|', '')])),
            new(
                'display_data',
                {'text/html': f'<table id="T_{k*5}"><td id="T_{k*5}_row0">1</td></table>', 'image/png': png},
            ),
        ]
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('k', id='injected'), cell]),
            tmp_path / f'{k}.ipynb',
        )
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('show()', id='a')])
        assert keep_outputs.take_outputs(nb, tmp_path / f'{k}.ipynb')
        return nb.cells[0].outputs
    a, b = executed('1'), executed('2')
    assert (
        a == b
        and [o.output_type for o in a] == ['stream', 'display_data']
        and a[0].text == 'in TEMPORARY and runs/store\n'
    )
    kept = base64.b64decode(a[1].data['image/png'])
    look = lambda x: np.asarray(Image.open(io.BytesIO(x)).convert('RGB'), float)
    assert len(kept) < len(f.getvalue())/2 and np.abs(look(kept) - look(f.getvalue())).mean() < 1
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('show(2)', id='a')])
    assert not keep_outputs.take_outputs(nb, tmp_path / '1.ipynb') and not nb.cells[0].outputs
    assert not keep_outputs.take_outputs(nb, tmp_path / 'absent.ipynb')


# ---- README

def blocks(kind):
    text = (ROOT / 'README.md').read_text(encoding='utf-8') + (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    return re.findall(rf'```{kind}\n(.*?)```', text, flags=re.S)


NAMES = 'solar-repro', 'make', 'papermill', 'python', 'sh', 'conda'
FETCHING = (
    'solar-repro fetch --to DIR',
    'solar-repro base --rebuild',
)  # these need the network, or hours


def commands():
    "Every command of README and CONTRIBUTING, in blocks and in the text."
    text = (ROOT / 'README.md').read_text(encoding='utf-8') + (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    inline = [
        c
        for c in re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
        if c.split()[0] in NAMES and ' ' in c
    ]
    listed = [
        c
        for b in blocks('sh')
        for line in b.splitlines()
        if (c := re.sub(r'\s+#.*', '', line).strip()) and not c.startswith('#')
    ]
    return sorted({*listed, *inline})


AS_MODULE = 'import runpy, sys; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name="__main__")'
OURS = [c for c in commands() if c.startswith('solar-repro ') and c not in FETCHING]


@pytest.mark.parametrize('command', [c for c in commands() if c not in OURS])
def test_readme_command_is_one_that_works(command):
    "What would install, fetch or take long is checked by its own parser; what make runs is run by other tests."
    words = shlex.split(command.replace(' ...', ''))
    words = words[next(k for k, w in enumerate(words) if not re.fullmatch(r'[A-Z_]+=\S+', w)) :]  # VAR=value before it
    name, args = words[0], words[1:]
    if name == 'solar-repro':
        from solar_repro.reports.cli import parse
        parse(args)
    elif name == 'make':
        assert run('make', '-n', *args).returncode == 0
    elif name == 'papermill':
        from papermill import inspect_notebook
        assert {args[k + 1] for k, a in enumerate(args) if a == '-p'} <= set(
            inspect_notebook(str(ROOT / args[0]))
        ) and args[1].endswith('.ipynb')
    elif name in ('python', 'python3.11') and args[0] == '-m':
        assert args[1] in ('build', 'pytest', 'venv') or forked(AS_MODULE, *args[1:2], '--help').returncode == 0
    elif name == 'python':
        assert (ROOT / args[0]).is_file()
        for flag in (a for a in args[1:] if a.startswith('-')): assert f"'{flag}'" in (ROOT / args[0]).read_text(), flag
    elif name in ('nbdev_export', 'nbdev_clean', 'nbdev_test', 'jupyter'):
        assert (Path(sys.executable).parent / name).exists()
    elif name == 'sh':
        assert (ROOT / args[0]).is_file()
    else:
        assert name in ('git', 'cd', 'source', 'conda', 'pip'), f'{command}: say in this test how it is to be checked'


@pytest.fixture(scope='module')
def models(full, tmp_path_factory):
    "Checkpoints A and B, what both started from, a mergekit recipe, and the tables of a run: what commands name."
    from contextlib import chdir
    from solar_repro.reports.cli import main
    desk = tmp_path_factory.mktemp('desk')
    with chdir(desk): assert main(['run', '--profile', 'smoke', '--store', str(full)]) == 0
    for name, folder in (('SFT v1', 'A'), ('SFT v2', 'B'), ('base', 'C')):
        assert main(['export', name, str(desk / folder), '--profile', 'smoke', '--store', str(full)]) == 0
    (desk / 'CONFIG.yml').write_text(
        f'merge_method: linear\ndtype: float32\nmodels:\n  - {{model: {desk}/A, parameters: {{weight: 0.4}}}}\n  -'
        f' {{model: {desk}/B, parameters: {{weight: 0.6}}}}\n'
    )
    return desk


@pytest.mark.parametrize('command', OURS)
def test_readme_command_runs(command, full, models, tmp_path, monkeypatch, capsys):
    "As it stands, but on the smoke profile; DIR, NAME and mine.toml are what a reader would put there."
    from solar_repro.reports.cli import main
    monkeypatch.chdir(tmp_path)
    for f in models.iterdir():
        if f.name != 'runs': (tmp_path / f.name).symlink_to(f)
    shutil.copytree(models / 'runs', tmp_path / 'runs')
    args = shlex.split(command)[1:]
    args = [dict(NAME='SFT v1', DIR='new').get(a, a) for a in args]
    if args[0] not in ('init', 'merge', 'compare'):
        store = shutil.copytree(full, tmp_path / 'store')                       # what is built more stays here
        args += ['--store', str(store), *([] if {'--profile', '--recorded'} & {*args} else ['--profile', 'smoke'])]
    before = {a.name for a in tmp_path.iterdir()}
    assert main(args) == 0, capsys.readouterr().err
    made = {a.name for a in tmp_path.iterdir()} - before
    assert capsys.readouterr().out.strip() or made


def test_the_report_can_be_read_on_a_phone(models, chrome):
    "Tables scroll inside the page, which says so, and the names of rows stay where they are."
    chrome.look(390, 844)
    chrome.open((models / 'runs' / 'smoke' / 'report.html').as_uri())
    assert chrome.js('document.documentElement.scrollWidth') <= 390
    h6 = "[...document.querySelectorAll('#table3 ~ .wide th')].find(e => e.textContent.startsWith('H6'))"
    assert chrome.js(f'{h6}.getBoundingClientRect().right') <= 390, 'no number of Table 3 is seen before scrolling'
    pushed = "(b => [b.scrollLeft = 250, b.scrollLeft, b.querySelector('td').getBoundingClientRect().left])"
    _, moved, left = chrome.js(f"{pushed}(document.querySelector('.wide'))")
    assert moved > 100 and 0 <= left < 60
    shown = "getComputedStyle(document.querySelector('.hint')).display"
    assert chrome.js(shown) == 'block' and chrome.complaints() == []
    squeezed = "[...document.querySelectorAll('.claims td')].some(e => e.getBoundingClientRect().width < 300)"
    assert not chrome.js(squeezed), 'an opened claim is a narrow column'
    chrome.look(1200, 900)
    assert chrome.js(shown) == 'block', 'wide tables are cut there, too'
    chrome.look(1280, 900)
    assert chrome.js(shown) == 'none'


def test_a_run_with_nothing_to_do_writes_nothing(full, models, tmp_path, monkeypatch, capsys):
    "And what is damaged comes back."
    from solar_repro.reports.cli import main
    monkeypatch.chdir(tmp_path)
    runs = shutil.copytree(models / 'runs', tmp_path / 'runs')
    look = lambda: {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in runs.rglob('*') if f.is_file()}
    before, words = look(), ['run', '--profile', 'smoke', '--store', str(full)]
    assert main(words) == 0 and look() == before
    said = capsys.readouterr().out.split()
    assert len(said) == len(before) - 1 and all(Path(f).is_file() for f in said)     # all but the record of them
    (runs / 'smoke' / 'tables' / 'table3.csv').write_text('other')
    assert main(words) == 0 and {f: x for f, (x, _) in look().items()} == {f: x for f, (x, _) in before.items()}


def test_licences_and_citation_are_those_of_the_package():
    from configparser import ConfigParser
    from solar_repro.data import BENCHMARKS, FILES, SETS
    readme, ini = (ROOT / 'README.md').read_text(encoding='utf-8'), ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT / 'settings.ini')
    rows = dict(re.findall(r'^\| (.+?) \| (.+?) \|$', readme[readme.index('## Licences'):], flags=re.M))
    titles = (
        {t: x.title for t, x in BENCHMARKS.items()}
        | {x.files[0].name: x.title for x in SETS.values()}
        | dict(metamath='MetaMathQA', math='MATH')
    )
    for name, f in FILES.items():
        title = titles[name.split('/')[0]]
        assert any(k.split(',')[0] == f.licence and title in v for k, v in rows.items()), f'{title}: {f.licence}'
    software, = [b for b in re.findall(r'@software\{.*?\n\}', readme, flags=re.S)]
    assert f"{{{ini['DEFAULT']['version']}}}" in software and f"{{{ini['DEFAULT']['git_url']}}}" in software


@pytest.mark.parametrize('page', ['CONTRIBUTING.md', 'README.md'])
def test_contributing_names_what_exists(page):
    "Files, and the functions, classes and constants that a walk names; the front page is read, too."
    text = re.sub(r'```.*?```', '', (ROOT / page).read_text(encoding='utf-8'), flags=re.S)
    of = [ROOT / 'Makefile', *(ROOT / 'solar_repro').rglob('*.py'), *(p for p in NOTEBOOKS if p.stem != 'index')]
    code = '\n'.join(p.read_text(encoding='utf-8') for p in of)
    paths = set(re.findall(r'`((?:nbs|solar_repro|tests|tools|benchmarks)/[\w/.]+)`', text)) - {
        f'nbs/core/{len([*(ROOT / "nbs/core").glob("*.ipynb")]):02}_mine.ipynb'  # the folder's next number
    }
    assert len(paths) > 8 and not [p for p in paths if not (ROOT / p).exists()]
    names = {n.strip('.') for n in re.findall(r'`([A-Za-z_.]+)`', text) if '/' not in n}
    gone = [n for n in names if not re.search(rf'\b{re.escape(n.split(".")[-1])}', code) and not (ROOT / n).exists()]
    assert len(names) > 20 and not gone


def test_readme_python_and_profile_work(full, tmp_path, monkeypatch):
    "The Python of the front page runs as it stands, on the smoke profile; its profile of ten lines is a profile."
    monkeypatch.setenv('SOLAR_STORE', str(full))
    code, = [b for b in blocks('python') if 'Experiment(' in b]
    exec(code.replace("Experiment('tiny')", "Experiment('smoke')"), {})
    toml, = [b for b in blocks('toml') if 'extends' in b]
    (tmp_path / 'mine.toml').write_text(toml)
    (tmp_path / 'times.jsonl').write_text(json.dumps(ALPACA[0]) + '\n')
    assert len(toml.splitlines()) <= 12 and {'SFT v5', 'Merge v5', 'data/times'} <= set(
        build_graph(load_profile(tmp_path / 'mine.toml'))
    )


def test_recorded_runs_stand_on_the_front_page(full, tmp_path, monkeypatch):
    "A finished run becomes a record; pictures, machine and tables of the records appear between the marks."
    from solar_repro.pipeline import results
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import record_run
    with pytest.raises(SystemExit, match='expected a whole run'):
        record_run.record('smoke', 0, tmp_path / 'empty', tmp_path)
    file = record_run.record('smoke', 0, full, tmp_path)
    assert record_run.record('smoke', 0, full, tmp_path) == file
    with monkeypatch.context() as m, pytest.raises(SystemExit, match='is of .*, this run of another;.*--kind NAME'):
        m.setattr(results, 'makers', lambda of, here=results.makers: [x | dict(processor='another') for x in here(of)])
        record_run.record('smoke', 0, full, tmp_path)
    with monkeypatch.context() as m, pytest.raises(SystemExit, match='expected one machine and one set of libraries'):
        m.setattr(results, 'makers', lambda of, here=results.makers: 2*here(of))
        record_run.record('smoke', 0, full, tmp_path)
    monkeypatch.setattr(results, 'RECORDED', tmp_path)
    one, exp = Experiment('smoke', store=full), Experiment('smoke', store=tmp_path / 'none', recorded=True)
    assert file.stat().st_size < 30_000 and exp.label == 'smoke test, recorded, seed 0'
    pd.testing.assert_frame_equal(exp.scores(), one.scores())
    pd.testing.assert_frame_equal(exp.samples(), one.samples(), atol=1e-6)
    assert exp.made_on() == one.made_on() and 'torch' in exp.made_on()
    from solar_repro.reports.published import line_found, recorded_beside
    assert recorded_beside(one).label == exp.label and recorded_beside(exp) is None and line_found(exp) == ''
    from solar_repro.pipeline.sweep import CANDIDATES, sweep
    with pytest.raises(ValueError, match="no scores of 'linear 0.5 Cand. 1.* came with the package"):
        sweep(exp, *CANDIDATES, 3)
    record_run.record('smoke', 0, full, tmp_path, points=3)         # whose evaluations are those of Table 7
    results.read_record.cache_clear()
    line = [sweep(e, *CANDIDATES, 3) for e in (one, Experiment('smoke', store=tmp_path / 'none', recorded=True))]
    pd.testing.assert_frame_equal(*line, atol=1e-6)
    with pytest.raises(ValueError, match='with seed 7 came'): Experiment('smoke', seed=7, recorded=True)
    nbs, times = tmp_path / 'nbs', tmp_path / 'commands.json'
    nbs.mkdir()
    shutil.copy(ROOT / 'nbs' / 'index.ipynb', nbs)
    times.write_text('{"machines": "laptops", "minutes": {"make tables": [8.2, 12.1], "make test": [9]}}')
    monkeypatch.setattr(record_run, 'TIMES', times)
    record_run.put(nbs / 'index.ipynb', record_run.text_of('smoke', nbs))
    record_run.put(nbs / 'index.ipynb', record_run.in_short('smoke'), *record_run.FOUND)
    record_run.put(nbs / 'index.ipynb', record_run.at_length('smoke'), *record_run.TOLD)
    text = (nbs / 'index.ipynb').read_text()
    assert text.index('Over items the recorded runs of the smoke test support') < text.index('## Commands')
    assert text.index('## Commands') < text.index('has the highest H6')
    assert '**smoke test, recorded, seed 0**, not SOLAR 10.7B, on ' in text and text.count('| SFT v3 + v4') >= 1
    took = '`make tables` took 8 to 13 minutes and `make test` took 9 minutes (measured once).'
    assert f'On laptops, set-up included, {took}' in text
    assert (nbs / 'recorded' / 'table4.png').is_file() and 'alt=\\"Table 4, smoke test' in text
    from build_readme import render
    assert 'src="nbs/recorded/table4.png"' in render(nbs / 'index.ipynb')


def test_a_report_says_what_made_it(full, tmp_path, monkeypatch):
    "Beneath its summary: processor, versions, seeds, days and the commit of the code."
    from solar_repro.reports import published
    monkeypatch.chdir(ROOT)
    here = run('git', 'describe', '--always', '--dirty', '--exclude=*').stdout.strip()
    assert published.commit() == here
    monkeypatch.chdir(tmp_path)
    assert published.commit() == '', 'this folder is no clone'
    monkeypatch.setattr(published, 'commit', lambda: '1234abc')
    published.published(Experiment('smoke', store=full))
    page = (tmp_path / 'runs' / 'smoke' / 'report.html').read_text(encoding='utf-8')
    made, = re.findall(r'<p class="soft">(smoke test.*?)</p>', page)
    wanted = r'smoke test, seed 0; .*torch \S+, .*scored \d{4}-\d\d-\d\d.*solar_repro \S+, commit 1234abc'
    assert re.fullmatch(wanted, made), made
    assert 'seeds 0 to 9; ' in published.made_by(Experiment('tiny', recorded=True))


def test_what_the_front_page_says_of_smol_is_its_record():
    "Differences that could be seen, items, minutes, and that scoring takes about as long as training."
    from solar_repro.tables import detectable
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    row, = re.findall(r'^\| `smol` \|.*$', readme, flags=re.M)
    exp = Experiment('smol', recorded=True)
    samples = exp.samples()
    seen = [detectable(n, samples) for n in range(3, 8)]
    assert f'{min(seen):.1f} to {max(seen):.1f} points in H6' in row
    items = samples[samples['task'] != 'gsm8k'].groupby(['model', 'task']).size()
    assert f'{items.min()} items of each choice benchmark' in row and items.min() == items.max()
    record = next(iter(exp.records.values()))
    assert f"in {record['seconds']/60:.0f} minutes of stages, two at a time" in row
    of = lambda *kinds: sum(x['seconds'] for x in record['stages'] if x['kind'] in kinds)
    assert .8 < of('eval')/of('sft', 'dpo', 'ref') < 1.25


def test_the_models_of_the_front_page_part_on_its_question(tmp_path):
    "It is an item of GSM8K of the tiny world that one of the two solves in every recorded run, and the other in none."
    code, = [b for b in blocks('python') if 'Experiment(' in b]
    asked = re.search(r"leo = '(.+)'", code)[1]
    wrong, right = re.search(r"side_by_side\(leo, '(.+)', '(.+)'\)", code).groups()
    exp = Experiment('tiny', store=tmp_path, recorded=True)
    item, = [i for i, d in enumerate(exp.requests('gsm8k')[0]) if d['question'] == asked]
    score = lambda e, m: e.items(m, 'gsm8k').set_index('doc_id').loc[item, 'score']
    runs = exp.repeated().values()
    assert len(runs) > 4 and {(score(e, wrong), score(e, right)) for e in runs} == {(0, 1)}


# ---- the lineage

@pytest.mark.parametrize('note', ['', '12.3 h'])
def test_no_arrow_of_the_lineage_runs_through_a_word(note):
    "Above the boxes stood the hours of a plan, and one arrow went through them."
    import matplotlib.pyplot as plt
    from matplotlib.path import Path as Line
    from solar_repro.core.figures import graph_figure
    from solar_repro.stages.graph import MODEL_KINDS
    graph = Experiment('tiny').graph
    fig = graph_figure(graph, MODEL_KINDS, {n: note for n, s in graph.items() if s.kind in MODEL_KINDS and note})
    fig.canvas.draw()
    words = [t for t in fig.axes[0].texts if t.get_text()]
    arrows = [t.arrow_patch for t in fig.axes[0].texts if hasattr(t, 'arrow_patch')]
    assert len(arrows) > 20 and len(words) > 30 + 15*bool(note)
    places = {t: t.get_window_extent().padded(2) for t in words}        # pixels
    for a in arrows:
        line = [Line(p) for p in a.get_transform().transform_path(a.get_path()).to_polygons(closed_only=False)]
        assert line and not [t.get_text() for t, x in places.items() if any(p.intersects_bbox(x, False) for p in line)]
    plt.close(fig)


# ---- the demo

def test_the_demo_is_one_page_and_part_of_the_run(full, tmp_path, monkeypatch, capsys):
    "Only the average, the DPO on it and their scores are new to a full store, and the paper's rows are found in it."
    from solar_repro.reports.cli import main
    monkeypatch.chdir(tmp_path)
    store = shutil.copytree(full, tmp_path / 'store')
    before = {a.key for a in Experiment('smoke', store=store).store.entries()}
    assert main(['demo', '--profile', 'smoke', '--store', str(store)]) == 0
    page = (tmp_path / 'runs' / 'smoke' / 'demo.html').read_text(encoding='utf-8')
    assert 'runs/smoke/demo.html' in capsys.readouterr().out
    new = {a.manifest['name'] for a in Experiment('smoke', store=store).store.entries() if a.key not in before}
    assert {n for n in new if not n.startswith('eval/')} == {
        'SFT v1 + v4', 'DPO on it', 'ref/SFT v1 + v4/ultrafeedback_clean'} and len(new) == 3 + 2*6
    for m in ('base', 'SFT v1', 'SFT v4', 'SFT v1 + v4', 'DPO on it'):
        assert page.count(f'>{m}</th>') == 6, m                  # a row of scores, and a column of each of five answers
    assert page.count('>expected</th>') == 5 and page.count('#### ') >= 2      # two of them with what GSM8K wants
    assert 'make tables' in page and 'smoke test' in page and not re.search(r'(?:src|href)=|@import', page)


# ---- rows of one's own

def own_profile(folder, extra='', rows=ALPACA):
    folder.mkdir(exist_ok=True)
    (folder / 'times.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (folder / 'mine.toml').write_text(
        'extends = "smoke"\n[sets.times]\nfile = "times.jsonl"\n[rows."SFT v5"]\nsets = ["alpaca_gpt4", "times"]\n'
        '[rows."Merge v5"]\nweights = {"Cand. 1" = 0.8, "Cand. 2" = 0.2}\n'
        + extra
    )
    return folder / 'mine.toml'


def test_own_rows_cost_only_what_is_new_and_stand_in_the_tables(full, tmp_path):
    store = shutil.copytree(full, tmp_path / 'store')
    exp = Experiment(
        own_profile(
            tmp_path / 'mine', '[rows."DPO v4"]\nstart = "SFT v5"\nsets = ["ultrafeedback_clean"]\nbeta = 0.2\n'
        ),
        store=store,
    )
    before = {a.key for a in exp.store.entries()}
    exp.run()
    built = {a.manifest['name'] for a in exp.store.entries() if a.key not in before}
    new = {
        'data/times',
        'contamination',
        'SFT v5',
        'Merge v5',
        'ref/SFT v5/ultrafeedback_clean',
        'DPO v4',
    }  # the new file is searched, too
    assert {b for b in built if not b.startswith('eval/')} == new and len(built) == len(new) + 3 * 6
    assert exp.rows('data/times') == ALPACA and exp.show('DPO v4')['settings']['dpo']['beta'] == .2
    t = exp.table(3)
    assert list(t['model']) == ['SFT v1', 'SFT v2', 'SFT v3', 'SFT v4', 'SFT v3 + v4', 'SFT v5']
    assert t['h6_paper'].notna().tolist() == [True] * 5 + [False] and t['h6'].notna().all()
    assert exp.table(7)['model'].iloc[-1] == 'Merge v5' and exp.table(4)['model'].iloc[-1] == 'DPO v4'
    from solar_repro.publishing.report import publish
    publish(exp.scores(), tmp_path / 'out', exp.label, exp.provenance(), exp.custom)
    text = (tmp_path / 'out' / 'report.html').read_text()
    table3, table7 = ((tmp_path / 'out' / 'tables' / f'table{n}.md').read_text() for n in (3, 7))
    assert 'SFT v5' in text and 'nan' not in table3
    own, merged = (next(x for x in y.splitlines() if m in x) for y, m in ((table3, 'SFT v5'), (table7, 'Merge v5')))
    assert len([c for c in own if c in '○✗']) == 3 and 'Average (' in merged, 'what a row of its own is made of'
    # the same bytes elsewhere are the same set; other bytes are another
    other = Experiment(own_profile(tmp_path / 'elsewhere'), store=store)
    assert set(other.status()['state']) == {'built'}
    changed = Experiment(own_profile(tmp_path / 'mine', rows=ALPACA[:-1]), store=store)
    missing = set(changed.status().query('state == "missing"')['stage'])
    assert {m for m in missing if not m.startswith('eval/')} == {'data/times', 'contamination', 'SFT v5'}


@pytest.mark.parametrize(
    'line, says',
    [
        ('{"prompt": "a"}', 'has the keys ["prompt"]'),
        ('not JSON', 'line 1 is no JSON'),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', 'holds pairs'),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_before_any_work(tmp_path, line, says):
    profile = own_profile(tmp_path / 'mine')
    (tmp_path / 'mine' / 'times.jsonl').write_text(line + '\n')
    with pytest.raises(ValueError, match=re.escape(says.replace('"', "'"))):
        Experiment(profile, store=tmp_path / 'store')
    (tmp_path / 'mine' / 'times.jsonl').unlink()
    with pytest.raises(ValueError, match='there is no file'): Experiment(profile, store=tmp_path / 'store')


def test_a_bad_row_of_a_file_names_its_place(tmp_path):
    exp = Experiment(
        own_profile(tmp_path / 'mine', rows=[*ALPACA, dict(prompt='x', completion=' ')]), store=tmp_path / 'store'
    )
    with pytest.raises(ValueError, match="times.jsonl: line 13 has nothing in field 'completion'"):
        exp.build('data/times')
    exp = Experiment(own_profile(tmp_path / 'mine'), store=tmp_path / 'store')
    (tmp_path / 'mine' / 'times.jsonl').write_text('{"prompt": "a", "completion": "b"}')  # no newline at the end
    with pytest.raises(ValueError, match='has changed since the run began'): exp.build('data/times')
    assert len(Experiment(tmp_path / 'mine' / 'mine.toml', store=tmp_path / 'store').rows('data/times')) == 1
    (tmp_path / 'mine' / 'times.jsonl').write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    with pytest.raises(ValueError, match='times.jsonl: line 2 is no JSON'):
        Experiment(tmp_path / 'mine' / 'mine.toml', store=tmp_path / 'store').build('data/times')


# ---- in Jupyter

def test_an_experiment_and_its_models_show_themselves(full):
    exp = Experiment('smoke', store=full)
    assert f'all {len(exp.graph)} stages are built' in repr(exp) and 'Table 7: 4 of 4' in exp._repr_html_()
    lines = repr(exp['DPO v2']).splitlines()
    assert (
        lines[0] == exp.label
        and lines[1].startswith('DPO v2: DPO, beta')
        and any(l.strip().startswith('base: base') for l in lines)
    )
    assert '<details' in exp['Merge v1']._repr_html_()
    chat = exp['SFT v3'].chat('What is 3 + 4?', max_new_tokens=4)
    assert 'What is 3 + 4?' in chat.html and exp.label in chat.html
    both = exp.side_by_side('What is 3 + 4?', 'SFT v3', 'Merge v4', max_new_tokens=4)
    assert both.html.count('<th scope') == 2 and repr(both).splitlines()[1].startswith('SFT v3: ')


def test_costs_are_told_from_what_is_built(full):
    s = Experiment('smoke', store=full).status()
    n, half = (s['kind'] == 'dpo').sum(), s.copy()
    half.loc[half['kind'] == 'dpo', ['state', 'seconds']] = ['missing', None]
    assert headline(s) == f'all {len(s)} stages are built'
    assert re.fullmatch(rf'{len(s) - n} of {len(s)} stages are built; for the other {n}: about [1-9][\d.]* (s|min|h) '
                        'on this machine', headline(half))


IN_KERNEL = HELD + '''
from solar_repro.pipeline.experiment import Experiment
exp = Experiment('smoke', store={store!r})
exp.run(['SFT v1'])
'''


def test_a_cell_shows_progress_and_can_be_interrupted_without_harm(full, tmp_path):
    "A kernel as Jupyter starts it: a line below the cell, then an interrupt; run again, the same bits as without."
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(
        kernel_name='python3', env=ENV, cwd=str(tmp_path)
    )
    try:
        def cell(code, stop_at=None):
            lines, error = [], None
            asked = client.execute(code)
            while True:
                m = client.get_iopub_msg(timeout=3600)
                if m['parent_header'].get('msg_id') != asked: continue
                if m['msg_type'] in ('display_data', 'update_display_data'):
                    lines.append(m['content']['data'].get('text/html', ''))
                state = m['content'].get('data', {}).get('state', {}) if m['msg_type'].startswith('comm_') else {}
                if isinstance(state.get('value'), str): lines.append(state['value'].replace('\u2007', ' '))
                if m['msg_type'] == 'comm_close': lines.append('')
                if stop_at and lines and stop_at in lines[-1]:
                    manager.interrupt_kernel()
                    stop_at = None
                if m['msg_type'] == 'error': error = m['content']['ename']
                if m['msg_type'] == 'status' and m['content']['execution_state'] == 'idle': return lines, error
        cell('import peft, torch, transformers, trl, solar_repro.sft')
        lines, error = cell(IN_KERNEL.format(store=str(tmp_path / 'store')), stop_at='SFT v1, step 1 of')
        assert error == 'KeyboardInterrupt' and lines[-1] == '', lines
        assert any('stage 1 of' in x for x in lines), lines
        lines, error = cell("Progress.on_progress = say; exp.run(['SFT v1'])")
        assert error is None and 'SFT v1' in ''.join(lines) and lines[-1] == ''
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert (
        Experiment('smoke', store=tmp_path / 'store').build('SFT v1').content
        == Experiment('smoke', store=full).build('SFT v1').content
    )


LAB_CODE = """import sys
from solar_repro.pipeline.experiment import Experiment
print(sys.executable, sys.prefix)
Experiment('smoke', store={store!r})"""


@contextmanager
def lab(home, port):
    "JupyterLab as `make lab` starts it; yields a function that asks it."
    recipe = run('make', '-n', '--no-print-directory', 'lab').stdout.splitlines()[-1]
    assert recipe.split() == ['.venv/bin/python', '-m', 'jupyterlab', 'nbs/06_tables.ipynb']
    command = recipe.replace('.venv/bin/python', shlex.quote(sys.executable))
    command += f' --no-browser --allow-root --ip=127.0.0.1 --port={port} --IdentityProvider.token=t'
    env = {**{k: v for k, v in ENV.items() if not k.startswith(('JUPYTER', 'XDG'))}, 'HOME': str(home)}

    def ask(path, data=None):
        r = urllib.request.Request(
            f'http://127.0.0.1:{port}/{path}',
            headers=dict(Authorization='token t'),
            data=data and json.dumps(data).encode(),
        )
        return urllib.request.urlopen(r, timeout=3600).read()

    with open(home / 'log', 'w') as log:
        server = subprocess.Popen(f'exec env {command}', shell=True, cwd=ROOT, stdout=log, stderr=log, env=env)
        try:
            def answers():
                try: return ask('api/status')
                except OSError: return None
            wait_for(answers, server)
            yield ask
        finally:
            server.terminate(); server.wait()


def executed(connect, port, kernel, code):
    "Code executed by a kernel of the server: what it printed, what it showed."
    channels = f'ws://127.0.0.1:{port}/api/kernels/{kernel}/channels'
    ws = connect(channels, header=['Authorization: token t'], timeout=3600)
    head = dict(
        msg_id='1', msg_type='execute_request', username='', session='s', version='5.3', date='2026-01-01T00:00:00Z'
    )
    content = dict(code=code, silent=False)
    ws.send(json.dumps(dict(header=head, parent_header={}, metadata={}, channel='shell', content=content)))
    said, shown, busy = '', '', True
    while busy:
        m = json.loads(ws.recv())
        if m['parent_header'].get('msg_id') != '1': continue
        kind, content = m['msg_type'], m['content']
        if kind == 'error': raise AssertionError(content)
        if kind == 'stream': said += content['text']
        if kind == 'execute_result': shown += content['data'].get('text/html', '')
        busy = kind != 'status' or content['execution_state'] != 'idle'
    ws.close()
    return said, shown


@pytest.mark.slow
def test_make_lab_starts_the_environments_own_kernel(full, tmp_path):
    "On a machine whose home folder has a python3 kernel that does not work."
    websocket = pytest.importorskip('websocket', reason='websocket-client speaks to the kernel; JupyterLab brings it')
    rogue = tmp_path / '.local' / 'share' / 'jupyter' / 'kernels' / 'python3'
    rogue.mkdir(parents=True)
    spec = dict(argv=['/bin/false', '{connection_file}'], display_name='another', language='python')
    (rogue / 'kernel.json').write_text(json.dumps(spec))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    with lab(tmp_path, port) as ask:
        assert b'04_merge.ipynb' in ask('api/contents') and b'jupyter-config-data' in ask('lab')
        opened, = tmp_path.rglob('jpserver-file-to-run-*-open.html')        # what it has a browser read
        first, = set(re.findall(rf'http://[\w.]+:{port}/([^"?]+)', opened.read_text()))
        page = re.search(rb'jupyter-config-data" type="application/json">(.*?)</script>', ask(first), re.S)[1]
        assert json.loads(page)['treePath'] == '06_tables.ipynb'
        kernel = json.loads(ask('api/kernels', dict(name='python3')))['id']
        code = LAB_CODE.format(store=str(full))
        said, shown = executed(websocket.create_connection, port, kernel, code)
    assert said.split()[-2:] == [sys.executable, sys.prefix], said
    assert 'Rows scored' in shown and 'stages are built' in shown


# ---- the wheel

OURS_ALONE, = [c.replace('seed 1', 'seed 0') for c in commands() if c.startswith('papermill') and 'smoke' in c]


@pytest.mark.parametrize('papermill', [                 # README's, with the seed of the store, and a shorter notebook
    'papermill nbs/00_paper.ipynb OUT.ipynb -p profile smoke', pytest.param(OURS_ALONE, marks=pytest.mark.slow)])
def test_wheel_works_outside_the_repository(full, tmp_path, papermill):
    "Built from a copy of the tree, installed into a new environment, used from a new folder to run a notebook."
    tree = tmp_path / 'tree'
    tree.mkdir()
    for name in ('nbs', 'solar_repro'):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'MANIFEST.in', 'LICENSE'):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    made = run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp_path, tree)
    assert made.returncode == 0, made.stderr[-2000:]
    wheel, = tmp_path.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'solar_repro').rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    }
    assert not here - names
    assert {n.removeprefix('solar_repro/notebooks/') for n in names if n.endswith('.ipynb')} == {
        p.relative_to(ROOT / 'nbs').as_posix() for p in NOTEBOOKS
    }
    # a new environment, which has the libraries of this one (nothing is fetched) but not its solar_repro
    import sysconfig
    venv, work = tmp_path / 'venv', tmp_path / 'my-solar'
    assert run(sys.executable, '-m', 'venv', '--without-pip', venv).returncode == 0
    site_packages = venv / 'lib' / f'python{sys.version_info.major}.{sys.version_info.minor}' / 'site-packages'
    made = run(
        *pip, '--python', venv, 'install', '--no-deps', '--no-index', wheel, PYTHONPATH=''
    )  # this tree would count as installed
    assert made.returncode == 0, made.stderr[-2000:]
    (site_packages / 'libraries.pth').write_text(sysconfig.get_path('purelib'))
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'SOLAR_STORE')}
    def there(*cmd, cwd=tmp_path, **more):
        return subprocess.run(
            [str(venv / 'bin' / cmd[0]), *map(str, cmd[1:])],
            cwd=cwd,
            env={**env, **more},
            capture_output=True,
            text=True,
        )
    assert there('python', '-c', 'import solar_repro; print(solar_repro.__file__)').stdout.startswith(
        str(site_packages)
    )
    made = there('solar-repro', 'init', work)
    assert made.returncode == 0 and f'{len(NOTEBOOKS)} notebooks' in made.stdout, made.stderr[-2000:]
    assert 'is not empty' in there('solar-repro', 'init', work).stderr
    made = there('solar-repro', 'status', cwd=work)
    assert made.returncode == 0 and str(work / 'runs' / 'store') in made.stdout, made.stderr[-2000:]
    made = there('solar-repro', 'table', '5', '--profile', 'smoke', cwd=work, SOLAR_STORE=str(full))
    assert made.returncode == 0 and 'smoke test, seed 0' in made.stdout, made.stderr[-2000:]
    made = there('python', '-m', *shlex.split(papermill), '--no-progress-bar', cwd=work, SOLAR_STORE=str(full))
    assert made.returncode == 0 and 'unknown parameter' not in made.stderr.lower(), made.stderr[-2000:]
    cells = nbformat.read(work / shlex.split(papermill)[2], 4).cells
    injected = [c.source for c in cells if 'injected-parameters' in c.metadata.get('tags', [])]
    assert len(injected) == 1 and 'smoke' in injected[0] and any(c.get('outputs') for c in cells)
    if 'merge' in papermill: assert any('smoke test, seed 0' in str(c.get('outputs')) for c in cells)
