"The whole recipe at smoke scale: the same bits every time, whatever interrupts it, and nothing built twice."
import json
import random
import shutil
import signal
from importlib.metadata import version

import drivers
import pandas as pd
import pytest
from forked import Forked, HELD
from waiting import wait_for

from solar_repro.core.config import load_profile
from solar_repro.stages.graph import CODE_VERSIONS, MODELS
from solar_repro.pipeline.experiment import Experiment
from solar_repro.paper import H6_TASKS

RUN = '''
import sys
from solar_repro.pipeline.experiment import Experiment
names = sys.argv[2:] or None
Experiment('smoke', store=sys.argv[1]).run(names)
'''
# Trained twice, by two processes or around a kill, these show what the whole recipe would, in a fifth of the time.
FEW = ['eval/Merge v1/arc', 'eval/Merge v1/gsm8k']


def start(store, *names, **env):
    return Forked(RUN, store, *names, env=env)


def finish(p):
    err = p.communicate()[1]
    assert p.returncode == 0, err
    return err


def artifacts(store):
    "Stage name -> (key, content); fails if two artifacts have one name."
    found = [(a.manifest['name'], (a.key, a.content)) for a in Experiment('smoke', store=store).store.entries()]
    assert len(dict(found)) == len(found)
    return dict(found)


def stamps(store):
    entries = Experiment('smoke', store=store).store.entries()
    return {a.key: (a.path/'manifest.json').stat().st_mtime_ns for a in entries}


def below(exp, *names):
    "The stages that are built from any of `names`, these included."
    out = set(names)
    for n, s in exp.graph.items():
        if out & set(s.inputs.values()): out.add(n)
    return out


def new_stages(exp, before):
    "Names of what a store holds that it did not hold before."
    return {a.manifest['name'] for a in exp.store.entries() if a.key not in before}


@pytest.fixture
def copy(full, tmp_path):
    "A full store of one's own, to damage or to add to."
    return shutil.copytree(full, tmp_path/'copy')


# -- the same, bit for bit

@pytest.mark.slow
def test_two_runs_give_the_same_bits(full, tmp_path):
    "All of it; the tests of kills and of two processes below build a part of it a second time."
    finish(start(tmp_path/'other'))
    one, two = artifacts(full), artifacts(tmp_path/'other')
    assert one == two and set(one) == set(Experiment('smoke', store=full).graph)
    a, b = Experiment('smoke', store=full), Experiment('smoke', store=tmp_path/'other')
    for n in ('SFT v3', 'DPO v2', 'Cand. 2'):
        f = 'adapter/adapter_model.safetensors'
        assert (a.build(n).path/f).read_bytes() == (b.build(n).path/f).read_bytes()
    pd.testing.assert_frame_equal(a.scores(), b.scores(), check_exact=True)
    for n in range(3, 8): assert a.table(n).to_csv(index=False) == b.table(n).to_csv(index=False)


def test_scores_are_whole(full):
    s = Experiment('smoke', store=full).scores()
    assert len(s) == 16*7 and not s.isna().any().any() and s['score'].between(0, 1).all()
    assert set(s['model']) == {'base', *MODELS} and set(s['task']) == {*H6_TASKS, 'truthfulqa_plain'}


def test_a_second_run_builds_nothing(copy):
    before = stamps(copy)
    assert finish(start(copy)) == ''
    assert stamps(copy) == before


def test_another_seed_trains_other_adapters_on_the_same_base_and_benchmarks(full, copy):
    a, b = Experiment('smoke', store=full), Experiment('smoke', seed=1, store=copy)
    b.run(['SFT v1', 'base', *(f'bench/{t}' for t in H6_TASKS)])
    for n in ('base', *(f'bench/{t}' for t in H6_TASKS)): assert b.build(n).key == a.build(n).key
    assert b.build('SFT v1').content != a.build('SFT v1').content
    assert b.build('SFT v1').manifest['seed'] == 1
    assert b.build('data/alpaca_gpt4').content != a.build('data/alpaca_gpt4').content


# -- kills and neighbours

KILLED = '''
import os, signal, sys, threading
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.progress import Progress
store, moment, after, *names = sys.argv[1:]
begin = Progress.start
def start(self, name, *slot):
    begin(self, name, *slot)
    if name == moment: threading.Timer(float(after), os.kill, (os.getpid(), signal.SIGKILL)).start()
Progress.start = start
Experiment('smoke', store=store).run(names)
'''


def test_killed_again_and_again_it_ends_with_the_same_results(full, tmp_path):
    "Each run kills itself up to a quarter of a second into a stage."
    store, draw, whole = tmp_path/'store', random.Random(0), artifacts(full)
    for moment in ('SFT v3', 'ref/SFT v3/ultrafeedback_clean', 'Cand. 1', 'eval/Merge v1/arc'):
        p = Forked(KILLED, store, moment, draw.uniform(0, .25), *FEW)
        assert p.wait() == -signal.SIGKILL, p.err
        assert all(whole[n] == a for n, a in artifacts(store).items())
    err = finish(start(store, *FEW))
    assert 'damaged' not in err
    exp = Experiment('smoke', store=store)
    assert artifacts(store) == {n: whole[n] for n in exp.needs(FEW)}
    assert not list((store/'building').iterdir())


def test_ctrl_c_says_what_is_kept(tmp_path):
    p = Forked(HELD + RUN, tmp_path/'store', 'SFT v1')
    wait_for(lambda: 'SFT v1, step 1 of' in p.err, p)
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode != 0
    assert 'interrupted in SFT v1; 2 of 3 stages are finished and kept. Run again to go on.' in err
    assert set(artifacts(tmp_path/'store')) == {'base', 'data/alpaca_gpt4'}


def test_two_processes_on_one_store_build_each_stage_once(full, tmp_path):
    "Neither waits for a stage that the other is building while there is another to build."
    store, names = tmp_path/'store', ['eval/DPO v1/arc', 'eval/SFT v2/gsm8k']
    ps, (one, other) = drivers.two(store, 1, names, hold='SFT v3')
    whole, exp = artifacts(full), Experiment('smoke', store=store)
    assert 'SFT v3' in one and other and sorted(one + other) == sorted(exp.needs(names))
    told = ps[1].err.splitlines()
    waits = 'SFT v3 is being built by another run; waiting for it beside other work'
    assert told.count(waits) <= 1                          # none, if it came to SFT v3 when that was there
    assert not any('damaged' in p.err for p in ps)
    assert artifacts(store) == {n: whole[n] for n in exp.needs(names)}
    assert not list((store/'building').iterdir())


# -- what a change rebuilds

def changed(**updates):
    "The smoke profile with other values at dotted places."
    raw = load_profile('smoke').model_dump()
    for where, value in updates.items():
        *path, last = where.split('__')
        at = raw
        for k in path: at = at[k.replace('_', ' ', 1) if k.startswith('Cand.') else k]
        at[last] = value
    return load_profile('smoke').model_validate(raw)


def test_a_candidates_own_setting_rebuilds_what_stands_below_it_and_nothing_else(copy):
    before = stamps(copy)
    exp = Experiment(changed(**{'dpo__rows__Cand._1__learning_rate': 1.1e-3}), store=copy)
    missing = set(exp.status().query('state == "missing"')['stage'])
    expected = below(exp, 'Cand. 1 step 1', 'Cand. 1')
    assert expected == missing
    assert expected & set(MODELS) == {'Cand. 1', 'Merge v1', 'Merge v2', 'Merge v3', 'Merge v4'}
    exp.run()
    assert new_stages(exp, before) == expected
    assert {k: t for k, t in stamps(copy).items() if k in before} == before


def test_fewer_rows_of_a_set_rebuild_what_stands_below_it(copy):
    before = stamps(copy)
    exp = Experiment(changed(data__rows__synth_math_alignment=12), store=copy)
    names = ['DPO v1', 'DPO v2', 'SFT v4', 'eval/DPO v1/arc', 'eval/DPO v2/arc']
    exp.run(names)
    assert new_stages(exp, before) == below(exp, 'data/synth_math_alignment') & set(exp.needs(names)) == {
        'data/synth_math_alignment', 'ref/DPO v1/synth_math_alignment', 'DPO v2', 'eval/DPO v2/arc'}


def test_the_profiles_name_label_and_other_stages_settings_rebuild_nothing(copy):
    before = stamps(copy)
    exp = Experiment(changed(name='mine', label='mine'), store=copy)
    exp.run()
    assert stamps(copy) == before
    other = Experiment(changed(merge__slerp_t=.4), store=copy)
    assert set(other.status().query('state == "missing"')['stage']) == below(other, 'Merge v4')


def test_new_code_of_a_kind_that_makes_the_same_files_stops_there(copy, monkeypatch):
    "Keys hash the content of inputs: what comes out the same does not send its descendants back to work."
    before = stamps(copy)
    monkeypatch.setitem(CODE_VERSIONS, 'merge', CODE_VERSIONS['merge'] + 1)
    exp = Experiment('smoke', store=copy)
    exp.run()
    assert new_stages(exp, before) == {n for n, s in exp.graph.items() if s.kind == 'merge'}


def test_joint_mode_trains_on_both_sets_at_once(copy):
    before = stamps(copy)
    exp = Experiment(changed(dpo__mode='joint'), store=copy)
    exp.run(['DPO v1', 'DPO v2', 'eval/DPO v2/arc'])
    # DPO v1, one set, is the same model in both modes
    assert new_stages(exp, before) == {'ref/SFT v3/synth_math_alignment', 'DPO v2', 'eval/DPO v2/arc'}
    assert set(exp.show('DPO v2')['inputs']) == {
        'start', 'ultrafeedback_clean', 'synth_math_alignment', 'ref_ultrafeedback_clean', 'ref_synth_math_alignment'}
    assert not any('step 1' in n for n in exp.graph)
    one, all_ = (len(exp.log(n)) for n in ('DPO v1', 'DPO v2'))
    assert all_ == 2*one # 16 + 16 rows against 16


def test_a_reference_in_parts_is_the_reference(copy):
    before, whole = stamps(copy), Experiment('smoke', store=copy)
    parts = Experiment(changed(dpo__mode='joint', dpo__reference_parts=3), store=copy)
    parts.run(['DPO v2'])
    refs = [n for n in new_stages(parts, before) if n.startswith('ref/')]
    assert sorted(refs) == [f'ref/SFT v3/{d} {k} of 3' for d in ('synth_math_alignment', 'ultrafeedback_clean')
                            for k in (1, 2, 3)]
    both = [pd.concat([pd.read_csv(e.build(n).path/'logps.csv') for n in names], ignore_index=True) for e, names in
            ((parts, [f'ref/SFT v3/ultrafeedback_clean {k} of 3' for k in (1, 2, 3)]),
             (whole, ['ref/SFT v3/ultrafeedback_clean']))]
    pd.testing.assert_frame_equal(*both, check_exact=False, rtol=1e-5)      # pairs are grouped otherwise
    # both sets in their order: another would be refused at the start of the training, whose loss is ln 2
    assert abs(parts.log('DPO v2')['loss'].iloc[0] - .6931) < 1e-3


# -- damage

@pytest.mark.parametrize('name,file', [
    ('SFT v3', 'adapter/adapter_model.safetensors'), ('base', 'model.safetensors'), ('data/openorca', 'rows.jsonl'),
    ('Merge v4', 'checkpoint/model.safetensors'), ('eval/DPO v2/gsm8k', 'score.json')])
def test_a_damaged_file_is_built_again_and_nothing_else_is(copy, capfd, name, file):
    before, whole = stamps(copy), artifacts(copy)
    path = Experiment('smoke', store=copy).build(name).path
    data = bytearray((path/file).read_bytes()); data[len(data)//2] ^= 1; (path/file).write_bytes(data)
    Experiment('smoke', store=copy).run()
    err = capfd.readouterr().err
    assert f'{name} is damaged' in err and err.count('damaged (') == 1
    assert artifacts(copy) == whole
    after = stamps(copy)
    assert {a for a in after if after[a] != before[a]} == {whole[name][0]}


def test_a_lost_file_in_the_middle_is_built_again_when_only_the_end_is_asked_for(copy, capfd):
    whole = artifacts(copy)
    shutil.rmtree(Experiment('smoke', store=copy).build('SFT v3').path/'adapter')
    exp = Experiment('smoke', store=copy)
    assert isinstance(exp['Merge v1'].generate('What is 3 + 4?'), str)
    assert 'SFT v3 is damaged' in capfd.readouterr().err and artifacts(copy) == whole


# -- what a person asks

def test_an_unknown_stage_names_the_nearest(full):
    exp = Experiment('smoke', store=full)
    for ask in (exp.build, exp.model, exp.show, exp.__getitem__, exp.log):
        with pytest.raises(ValueError, match=r"no stage 'SFT v33' in profile smoke; did you mean 'SFT v3'\?"):
            ask('SFT v33')
    with pytest.raises(ValueError, match='is of kind data; expected a model, such as'): exp['data/openorca']
    with pytest.raises(ValueError, match='of kind merge; expected a training'): exp.log('Merge v1')


def test_a_model_answers(full):
    exp = Experiment('smoke', store=full)
    one = exp['SFT v3'].generate('What is 3 + 4?', max_new_tokens=8)
    assert isinstance(one, str) and one == exp['SFT v3'].generate('What is 3 + 4?', max_new_tokens=8)
    assert isinstance(exp['Merge v4'].generate('What is 3 + 4?', max_new_tokens=8), str)


def test_show_says_what_made_it(full):
    exp = Experiment('smoke', store=full)
    m = exp.show('DPO v2')
    assert m['settings']['dpo']['learning_rate'] == exp.profile.dpo.learning_rate
    assert m['seed'] == 0 == m['settings']['seed']
    assert m['inputs']['start']['name'] == 'DPO v1' and m['inputs']['start']['content'] == exp.build('DPO v1').content
    assert m['seconds'] > 0 and m['started'].endswith('Z') and m['versions']['torch'] == version('torch')
    assert json.dumps(m)


def test_status_tells_built_from_missing_and_builds_nothing(tmp_path, full):
    exp = Experiment('smoke', store=tmp_path/'none')
    assert set(exp.status()['state']) == {'missing'} and not (tmp_path/'none').exists()
    assert set(Experiment('smoke', store=full).status()['state']) == {'built'}
