"A kind of stage whose code has changed has a higher code version, or a proof that its results are the same."
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import code_versions  # noqa: E402


def test_no_kind_has_changed_without_its_version():
    said = code_versions.complaint(code_versions.read_record(), code_versions.now())
    assert not said, said


def test_nothing_to_say_is_no_failure():
    with pytest.raises(SystemExit) as e: code_versions.main()
    assert e.value.code == 0


@pytest.fixture
def copy(tmp_path, monkeypatch):
    "The package in a folder of its own, recorded as it is."
    shutil.copytree(ROOT/'solar_repro', tmp_path/'solar_repro', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'nbs'/'stages').mkdir(parents=True)
    shutil.copy(ROOT/'nbs'/'stages'/'01_graph.ipynb', tmp_path/'nbs'/'stages')
    monkeypatch.setattr(code_versions, 'ROOT', tmp_path)
    code_versions.write_record(code_versions.now())
    return tmp_path


def change(copy, file, old, new):
    path = copy/'solar_repro'/file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return code_versions.changed(code_versions.read_record(), code_versions.now())


REACHED = ( # file, old, new, kinds that it reaches, what is named
    ('models/training.py', 'weight_decay=settings.weight_decay', 'weight_decay=0.', {'sft', 'dpo'},
     'models.training.arguments'), # called by what the builder calls
    ('merging/methods.py', 'METHODS = ', 'METHODS = {} or ', {'merge'}, 'merging.methods.METHODS'), # a table
    ('models/resident.py', 'class Resident', 'class Resident(object)', {'eval'}, 'models.resident.Resident'),
    ('eval.py', '== 1', '== 0', {'eval'}, 'eval.mc2'), # named by a task file
    ('models/training.py', 'window_size=(-1, 0)', 'window_size=(-1, -1)', {'sft', 'dpo'},
     'models.training.attend_in_runs'), # registered under a name
    ('eval.py', 'FEWSHOT_SEED = ', 'FEWSHOT_SEED = 1 + ', {'eval'}, 'eval.FEWSHOT_SEED'), # a constant
    ('tasks/arc.yaml', 'metadata', 'metadata ', {'eval'}, 'tasks/arc.yaml'), # a file that is read
    ('pipeline/builder.py', 'set_flush_denormal(True)', 'set_flush_denormal(False)', {'sft', 'eval', 'merge', 'base'},
     'pipeline.builder.Builder._prepare')) # what all are built under


def test_a_change_is_named_with_the_kinds_that_it_reaches(copy):
    for file, old, new, kinds, where in REACHED:
        found = change(copy, file, old, new)
        assert kinds <= set(found) and all(where in found[k] for k in kinds)
        said = code_versions.complaint(code_versions.read_record(), code_versions.now())
        assert all(f'\n{k} (code version' in said for k in kinds) and where in said and 'raise KIND' in said
        code_versions.write_record(code_versions.now())


def test_what_changes_no_result_changes_no_kind(copy):
    "Comments, docstrings, words of errors, annotations; and functions that no builder calls."
    assert not change(copy, 'models/training.py', "The trainer's arguments that SFT and DPO share.", 'Other words.')
    assert not change(copy, 'models/training.py', 'training: the loss is', 'training: the loss was')
    assert not change(copy, 'models/training.py', 'seed:int, # of initialisation', 'seed, # for initialisation')
    assert not change(copy, 'publishing/figures.py', 'import ', 'import numpy\nimport ')


def test_raising_a_kind_records_it(copy, capsys):
    was = code_versions.read_record()
    change(copy, 'models/training.py', 'weight_decay=settings.weight_decay', 'weight_decay=0.')
    code_versions.main('raise', 'sft')
    now = code_versions.now()
    assert now['sft']['version'] == was['sft']['version'] + 1 and now['dpo']['version'] == was['dpo']['version']
    assert set(code_versions.changed(code_versions.read_record(), now)) == {'dpo'}
    text = ''.join(''.join(c['source']) for c in json.loads((copy/'nbs/stages/01_graph.ipynb').read_text())['cells'])
    assert f"sft={now['sft']['version']}," in text
    with pytest.raises(SystemExit, match="no kind 'stf'; expected"): code_versions.main('raise', 'stf')


def test_a_kind_raised_by_hand_is_to_be_recorded(copy):
    was = code_versions.now()
    code_versions.raise_kinds(['merge'], was)
    said = code_versions.complaint(was, code_versions.now())
    assert f"merge (code version {was['merge']['version']} -> {was['merge']['version'] + 1}, not recorded)" in said


def test_unchanged_is_believed_only_with_the_same_results(copy, monkeypatch, capsys):
    made = {'SFT v3': 'a', 'Table 3': 'b'}
    monkeypatch.setattr(code_versions, 'git', lambda *args: 'c0ffee')
    monkeypatch.setattr(code_versions, 'smoke', lambda code, folder: made if code != copy else made | other)
    change(copy, 'models/training.py', 'weight_decay=settings.weight_decay', 'weight_decay=0.')
    other = {'Table 3': 'c'}
    with pytest.raises(SystemExit, match='results have changed: Table 3'): code_versions.main('unchanged')
    other = {'SFT v3': None}                     # a stage that is no longer built
    with pytest.raises(SystemExit, match='results have changed: SFT v3'): code_versions.main('unchanged')
    other = {'a stage more': 'd'}
    code_versions.main('unchanged')
    assert 'c0ffee, byte for byte' in capsys.readouterr().out
    assert not code_versions.changed(code_versions.read_record(), code_versions.now())
    change(copy, 'tasks/arc.yaml', 'metadata', 'metadata ')
    with pytest.raises(SystemExit, match='tasks/arc.yaml: data'): code_versions.main('unchanged')
