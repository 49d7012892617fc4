"Forms that a profile may have and those that are refused: numbers, names, paths, and what stands over what."
import json
import shutil

import pandas as pd
import pytest

from solar_repro.core.config import load_profile, Profile, profiles, root
from solar_repro.core.figures import graph_figure
from solar_repro.core.files import write_whole
from solar_repro.core.store import sealed
from solar_repro.pipeline.experiment import Experiment
from solar_repro.stages.graph import build_graph, MODEL_KINDS
from solar_repro.pipeline.sweep import between
from solar_repro.publishing.text import as_text
from solar_repro.reports import notebooks as runner
from solar_repro.reports import published as publication
from solar_repro.reports.cli import main
from solar_repro.reports.verify import export_results, number


@pytest.fixture
def write(tmp_path):
    "Writes a profile over the smoke profile, or over another; its path."
    def write(text: str, name='mine.toml', over='smoke'):
        path = tmp_path/name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'extends = "{over}"\n{text}\n', encoding='utf-8')
        return path
    return write


@pytest.mark.parametrize('text,says', [
    (f'[sft]\nbatch_size = {10**21}', f'sft.batch_size = {10**21}: input should be less than'),
    (f'[sft]\nlora_alpha = {10**400}', 'sft.lora_alpha = 1000'),
    (f'[sft]\nlora_r = {10**12}', 'sft.lora_r'),
    (f'[sft]\nlora_r = {2**70}', 'sft.lora_r'),
    (f'[dpo]\nepochs = {10**24}', 'dpo.epochs'),
    (f'[dpo.rows."Cand. 1"]\nepochs = {10**24}', 'dpo.rows.Cand. 1.epochs'),
    ('[dpo]\nbeta = 1e300', 'dpo.beta'),
    (f'[eval.num_fewshot]\narc = {2**40}', 'eval.num_fewshot.arc'),
    (f'seed = {5000*"1"}', 'not valid TOML'),
    (f'seed = {5000*"["}{5000*"]"}', 'not valid TOML'),
    ('[eval]\nn_items = 0', 'mine.toml: eval.n_items = 0: input should be greater than 0. See'),
    ('[eval]\nn_items = "5"', "mine.toml: eval.n_items = '5': input should be a valid integer. See"),
    ('[eval.n_items]\narc = 0', 'eval.n_items.arc = 0: input'),
    ('[data]\nsource = "\\u0000"', 'data.source = '),
    ('[base]\nsource = "./\\u0000"', 'base.source = '),
    ('[rows.A]\nsets = ["openorca"]\nstart = ""', 'rows.A.start'),
    ('label = " "', "label = ' ': must be a line of text"),
    ('label = "a\\nb"', 'label = '), ('label = "\\u001b[31m"', 'label = '), ('label = "a\\u0000"', 'label = '),
    (f'name = "{100*"中"}"', 'at most 200 bytes'),
    (f'[rows."{100*"中"}"]\nsets = ["openorca"]', 'at most 200 bytes'),
    ('name = "tiny-seed1"', 'must not end in -recorded or -seed'),
    ('name = "tiny-recorded"', 'must not end in -recorded or -seed'),
    ('name = "store"', "name = 'store': must not be that of the folder of the results"),
])
def test_a_value_that_nothing_can_be_made_of(write, text, says):
    with pytest.raises(ValueError) as e: load_profile(write(text))
    assert says in str(e.value)


def test_items_by_number_and_by_name(write):
    tasks = load_profile('smoke').eval.num_fewshot
    by_name = '\n'.join(f'{t} = {k}' for k, t in enumerate(tasks, 3))
    for text, n in (('[eval]\nn_items = 7', 7), (f'[eval.n_items]\n{by_name}', dict(zip(tasks, range(3, 9))))):
        p = load_profile(write(text))
        assert p.eval.n_items == n and Profile.model_validate(p.model_dump(mode='json')) == p     # as workers get it


# ---- names of shipped profiles

@pytest.mark.parametrize('name', profiles())
def test_a_copy_of_a_shipped_profile_may_keep_its_name(write, tmp_path, name):
    copy = write('[machine]\nworkers = 2', f'{name}.toml', name)
    assert load_profile(copy).name == name and load_profile(copy, 3).seed == 3
    assert load_profile(write('seed = 3', f'{name}.toml', name)).seed == 3     # as --seed 3, in the same folder


@pytest.mark.parametrize('text', [
    'name = "tiny"', 'name = "smoke"\nlabel = "mine"', 'name = "smoke"\n[sft]\nepochs = 2'])
def test_other_settings_need_another_name(write, text):
    with pytest.raises(ValueError, match='as of a shipped profile that sets other things.*Rename it'):
        load_profile(write(text))


# ---- paths

def test_paths_count_from_the_profile_that_names_them(write, tmp_path, monkeypatch):
    below = '[data]\nsource = "data"\n[base]\nsource = "./base"\noffline = "../other"\n[sets.a]\nfile = "a.jsonl"'
    b = load_profile(write(below, 'B/base.toml'))
    a = load_profile(write('', 'A/mine.toml', '../B/base.toml'))
    at = tmp_path.resolve()
    assert (a.data, a.base, a.sets) == (b.data, b.base, b.sets)
    assert (a.data.source, a.base.source, a.sets['a'].file) == (f'{at}/B/data', f'{at}/other', f'{at}/B/a.jsonl')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert load_profile(write('', 'A/home.toml', '~/B/base.toml')).data == b.data
    assert load_profile(write('[data]\nsource = "mine"', 'A/mine.toml', '../B/base.toml')).data.source == f'{at}/A/mine'


@pytest.mark.parametrize('text', [b'x = 1\n', b'[a]\nx = 1\nx = 2\n', 'lib_name'.encode('utf-16'), b'\xff\xfe\x00'])
def test_settings_of_another_project_mark_no_folder(tmp_path, monkeypatch, text):
    (tmp_path/'settings.ini').write_bytes(text)
    (tmp_path/'inside').mkdir()
    monkeypatch.chdir(tmp_path/'inside')
    assert root() == tmp_path/'inside'
    (tmp_path/'settings.ini').write_bytes(b'\xef\xbb\xbf[DEFAULT]\r\nlib_name = solar_repro\r\n') # as Windows saves it
    assert root() == tmp_path


# ---- rows

HALVES = '[rows.A]\nweights = {{"{}" = 0.5, "{}" = 0.5}}\n'


@pytest.mark.parametrize('above,kind,inputs', [
    (HALVES.format('Cand. 1', 'Cand. 2'), 'merge', ['Cand. 1', 'Cand. 2']),
    ('[rows.A]\nsets = ["openorca"]', 'sft', ['base', 'data/openorca']),
    ('[rows.A]\ntable = 4', 'merge', ['SFT v1', 'SFT v2'])])
def test_a_row_over_another(write, above, kind, inputs):
    write(HALVES.format('SFT v1', 'SFT v2'), 'below.toml')
    s = build_graph(load_profile(write(above, over='below.toml')))['A']
    assert (s.kind, list(s.inputs.values())) == (kind, inputs)


def test_rows_may_stand_in_any_order(write):
    two = HALVES.format('B', 'SFT v1'), HALVES.replace('.A', '.B').format('SFT v2', 'SFT v1')
    one, other = (load_profile(write('\n'.join(x))) for x in (two, two[::-1]))
    assert list(one.rows) == ['A', 'B'] and build_graph(one) == build_graph(other)
    circle = HALVES.format('B', 'SFT v1') + HALVES.replace('.A', '.B').format('A', 'SFT v1')
    with pytest.raises(ValueError, match="rows.'A' builds on itself, by way of 'B'"):
        build_graph(load_profile(write(circle)))


# ---- models and benchmarks that are asked for

@pytest.mark.parametrize('ask,says', [
    (lambda e: e.flips('nobody', 'SFT v1', 'arc'), "the model 'nobody'; expected one of"),
    (lambda e: e.flips('SFT v11', 'SFT v1', 'arc'), "the model 'SFT v11'; did you mean 'SFT v1'"),
    (lambda e: e.items('SFT v1', 'h6'), "the benchmark 'h6'; expected one of"),
    (lambda e: e.scores(['sft v1']), "did you mean 'SFT v1'"), (lambda e: e.scores(3), "the model 3; expected one of"),
    (lambda e: e.items(None, 'arc'), 'the model None; expected'), (lambda e: e.scores(['base'], 'acr'), "mean 'arc'"),
    (lambda e: e.flips('SFT v1', ('base',), 'arc'), "the model .'base',.; "),
    (lambda e: e.requests('x'), "no stage 'eval/base/x' in profile .*; .*expected one of"),
    (lambda e: e.show(None), 'no stage None'),
    (lambda e: between(e, 'SFT v1', 'nobody'), "^sweep: this call names the model 'nobody'"),
    (lambda e: between(e, 'SFT v1', 'SFT v2', 20001), 'from 3 to 1001')])
def test_what_is_not_there_is_named(tmp_path, ask, says):
    with pytest.raises(ValueError, match=says): ask(Experiment('smoke', store=tmp_path))
    if 'sweep' in says or '1001' in says: return
    with pytest.raises(ValueError, match=says): ask(Experiment('tiny', store=tmp_path, recorded=True))


def test_one_name_may_stand_for_a_list_of_one(tmp_path):
    "It was taken letter by letter: no model 'S'."
    exp = Experiment('tiny', store=tmp_path, recorded=True)
    pd.testing.assert_frame_equal(exp.scores('SFT v1', 'arc'), exp.scores(['SFT v1'], ['arc']))
    pd.testing.assert_frame_equal(exp.samples('SFT v1'), exp.samples(['SFT v1']))
    assert exp.needs('SFT v1') == exp.needs(['SFT v1'])


def test_some_benchmarks_of_several_seeds_have_scores_and_no_h6(tmp_path):
    exp = Experiment('tiny', store=tmp_path, recorded=True)
    some, of_all = exp.scores(['SFT v1'], ['arc', 'gsm8k']), exp.scores(['SFT v1'])
    wanted = of_all[of_all['task'].isin(['arc', 'gsm8k'])].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, wanted)


# ---- odd names, where they are shown

ODD = '[best]', '*mine', '~~gone~~', 'a $x^$ b', '<img src=x>', 'SFT_v1', 'gold'


@pytest.fixture(scope='module')
def odd(full, tmp_path_factory):
    "A built experiment whose rows have odd names: all are one merge of what is there."
    folder = tmp_path_factory.mktemp('odd')
    rows = '\n'.join(f'[rows.{json.dumps(n)}]\nweights = {{"SFT v1" = 0.5, "SFT v4" = 0.5}}' for n in ODD)
    (folder/'odd.toml').write_text(f'extends = "smoke"\nlabel = "costs $5 $x^$"\n{rows}\n')
    shutil.copytree(full, folder/'store')
    exp = Experiment(folder/'odd.toml', store=folder/'store')
    exp.scores()
    return exp


def test_odd_names_in_tables_and_pictures(odd):
    text = {kind: as_text(7, kind, odd.scores(), odd.label, odd.custom[7]) for kind in ('tex', 'md', 'html')}
    assert '\n{[}best] &' in text['tex'] and '\n{*}mine &' in text['tex']
    assert r'| \~\~gone\~\~ ' in text['md'] and '<img src=x' not in text['html']
    odd.plot(7).canvas.draw()
    graph_figure(odd.graph, MODEL_KINDS).canvas.draw()
    score = number(odd, '<img src=x>', 'arc')
    assert '<img' not in score._repr_html_() and '&lt;img src=x&gt;, arc' in score._repr_html_()
    with pytest.raises(ValueError, match='two columns one name.*rename the row'): odd.flips('gold', 'SFT v1', 'arc')
    assert len(odd.flips('SFT_v1', 'SFT v1', 'arc').columns) == 8


def test_results_of_like_names_get_folders_of_their_own(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, 'items', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): export_results(odd, tmp_path/'out', ['SFT v1', 'SFT_v1'])
    assert not any((tmp_path/'out').iterdir())     # all of them, or none
    monkeypatch.undo()
    files = export_results(odd, tmp_path/'out', ['SFT v1', 'SFT_v1', *ODD[:3]])
    names = {json.loads(f.read_text())['model_name']: f.parent.name for f in files if f.name.startswith('results_')}
    assert names == {'SFT v1': 'SFT_v1', 'SFT_v1': 'SFT_v1-2', '[best]': '_best_', '*mine': '_mine',
                     '~~gone~~': '_gone_'}
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == sorted(names.values())
    assert all(f.is_file() for f in files) and len(files) == 7*len(names)


@pytest.mark.parametrize('damaged', [b'', b'{', b'[]', b'{}', b'null', b'\xff', b'{"files": 3}', 2000*b'['])
def test_a_damaged_note_of_what_was_published_counts_as_none(full, tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(publication, 'publish', lambda *args: [write_whole(tmp_path/'runs'/'smoke'/'t.md', 'a table')])
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = solar_repro\n')
    monkeypatch.chdir(tmp_path)
    exp = Experiment('smoke', store=full)
    exp.folder.mkdir(parents=True)
    for name in ('published.json', 'notebooks.json'): (exp.folder/name).write_bytes(damaged)
    assert publication.published(exp) == [exp.folder/'t.md']
    monkeypatch.setattr(publication, 'publish', lambda *args: 1/0) # it is not written again
    assert publication.published(exp) == [exp.folder/'t.md']
    assert runner._Run('smoke', None, exp).done == {}


def test_sets_of_one_training_make_the_same_in_any_order(write):
    "They had one key, and were concatenated as they were named: which was built first decided for both."
    def trained(sets, mode='joint', **more):
        dpo = f'start = "SFT v3"\nsets = {json.dumps(sets)}' if mode else f'sets = {json.dumps(sets)}'
        stage = build_graph(load_profile(write(f'[dpo]\nmode = "{mode or "stepwise"}"\n[rows.X]\n{dpo}\n')))['X']
        return list(stage.inputs.values())
    sft = ['openorca', 'alpaca_gpt4']
    assert trained(sft, '') == trained(sft[::-1], '') == ['base', 'data/alpaca_gpt4', 'data/openorca']
    pairs = ['synth_math_alignment', 'ultrafeedback_clean']
    assert trained(pairs) == trained(pairs[::-1])
    assert trained(pairs, 'stepwise') != trained(pairs[::-1], 'stepwise')      # steps have an order


def test_a_folder_of_a_base_counts_from_the_profile_however_it_is_written(write, tmp_path, monkeypatch):
    (tmp_path/'bases'/'toy').mkdir(parents=True)
    path = write('[base]\nsource = "bases/toy"\n')
    monkeypatch.chdir('/')
    assert load_profile(path).base.source == str((path.parent/'bases'/'toy').resolve())


def test_another_protocol_writes_the_tables_again_and_what_is_no_longer_made_goes(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def made(protocol):
        text = f'extends = "smoke"\nlabel = "mine"\n[eval]\nprotocol = "{protocol}"\n'
        (tmp_path/'mine.toml').write_text(text)
        exp = Experiment('mine.toml', store=full)
        publication.published(exp)
        return exp, (exp.folder/'tables'/'table3.csv').read_text()
    exp, now = made('modern')
    record = json.loads((exp.folder/'published.json').read_text())
    (exp.folder/'tables'/'noise.csv').write_text('of seeds that were taken out')
    record['files']['tables/noise.csv'] = ''
    (exp.folder/'published.json').write_text(json.dumps(sealed(record)))
    (exp.folder/'tables'/'.table4.0123.csv').write_text('of a run that was killed')
    (exp.folder/'tables'/'.ipynb_checkpoints').mkdir()
    then = made('leaderboard-2023')[1]
    assert then != now and not (exp.folder/'tables'/'noise.csv').exists()
    assert main(['verify', '--profile', 'mine.toml', '--store', str(full)]) == 0
