"What somebody meets who has just come: commands that say where, how much and what to do; the line between two models."
from pathlib import Path

import pytest

from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.sweep import between, is_built, sweep
from solar_repro.reports.cli import main

ROOT = Path(__file__).resolve().parents[1]


def test_outside_a_clone_nothing_long_is_built_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('SOLAR_STORE', raising=False)
    assert main(['table', '5']) == 2
    said = capsys.readouterr().err
    assert '--yes' in said and str(tmp_path/'runs'/'store') in said, said
    assert not list((tmp_path/'runs'/'store').glob('sft*'))


def test_where_the_line_is_asked_at_the_papers_points_nothing_new_is_built(full, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exp = Experiment('smoke', store=full)
    assert exp.profile.merge.slerp_t == .5
    before = {a.path for a in exp.store.entries()}
    assert main(['sweep', 'Cand. 1', 'Cand. 2', '--points', '3', '--profile', 'smoke', '--store', str(full)]) == 0
    assert {a.path for a in exp.store.entries()} == before
    out = capsys.readouterr().out
    assert 'told from' in out and Path(out.splitlines()[-1]).stat().st_size > 10_000
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
