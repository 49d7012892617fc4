"The recipe at smoke scale: determinism, kills, exact rebuilding, damage, two runs at once."
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from solar_repro import tables
from solar_repro.lab.profile import Profile, load_profile
from solar_repro.lab.run import Lab

RUN = "import sys; from solar_repro.lab.run import Lab; Lab('smoke', store=sys.argv[1]).run()"


@pytest.fixture(scope='session')
def full(tmp_path_factory):
    "A store that holds the whole smoke recipe."
    folder = tmp_path_factory.mktemp('full')/'store'
    Lab('smoke', store=folder).run()
    return folder


@pytest.fixture
def copy(full, tmp_path): return Path(shutil.copytree(full, tmp_path/'store'))


def contents(lab): return lab.status().set_index('stage')['content'].to_dict()


def changed(**sections):
    "The smoke profile with some settings changed."
    raw = load_profile('smoke').model_dump()
    for name, new in sections.items(): raw[name] = {**raw[name], **new}
    return Profile.model_validate(raw)


def missing(lab): return set(lab.status().query('state == "missing"')['stage'])


def descendants(lab, *names):
    "Stages that are built from any of these, themselves included."
    out = set(names)
    for s in lab.recipe.values():
        if out & set(s.inputs.values()): out.add(s.name)
    return out


def test_same_seed_same_tables_bit_for_bit(full, tmp_path):
    "A killed and resumed run in another process gives the content of an uninterrupted one, stage by stage."
    again = tmp_path/'again'
    for seconds in (9, 13):                                      # somewhere in the trainings; a slow machine is killed earlier in them
        p = subprocess.Popen([sys.executable, '-c', RUN, str(again)], stderr=subprocess.DEVNULL)
        time.sleep(seconds); p.kill(); p.wait()
    subprocess.run([sys.executable, '-c', RUN, str(again)], check=True, stderr=subprocess.DEVNULL)
    a, b = Lab('smoke', store=full), Lab('smoke', store=again)
    assert contents(a) == contents(b) and '' not in contents(a).values()
    assert [t.to_csv() for n in range(3, 8) for t in [a.table(n)]] == [t.to_csv() for n in range(3, 8) for t in [b.table(n)]]


def test_another_seed_shares_base_and_benchmarks_only(full, tmp_path):
    a, b = Lab('smoke', store=full), Lab('smoke', seed=1, store=full)
    assert {n for n in b.recipe if n not in missing(b)} == {'base', *(f'bench/{t}' for t in ('arc', 'hellaswag', 'mmlu', 'truthfulqa', 'winogrande', 'gsm8k')),
                                                           *(f'eval/base/{t}' for t in ('arc', 'hellaswag', 'mmlu', 'truthfulqa', 'winogrande', 'gsm8k'))}
    other = Lab('smoke', seed=1, store=shutil.copytree(full, tmp_path/'s'))
    assert other.build('SFT v1').content != a.build('SFT v1').content


@pytest.mark.parametrize('sections,roots', [
    (dict(dpo=dict(rows={**load_profile('smoke').model_dump()['dpo']['rows'], 'Cand. 1': dict(learning_rate=.0005)})), ['Cand. 1 step 1', 'Cand. 1']),
    (dict(merge=dict(slerp_t=.25)), ['Merge v4']),
    (dict(data=dict(rows={**load_profile('smoke').data.rows.model_dump(), 'synth_math_instruct': 23})), ['data/synth_math_instruct']),
    (dict(eval=dict(num_fewshot={**load_profile('smoke').eval.num_fewshot.model_dump(), 'arc': 3})), [f'eval/{m}/arc' for m in ('base', *[m for n in range(3, 8) for m in tables.models(n)])])])
def test_a_change_rebuilds_its_descendants_and_nothing_else(full, sections, roots):
    lab = Lab(changed(**sections), store=full)
    assert missing(lab) == descendants(lab, *roots)


def test_equal_settings_are_found_under_any_name(full):
    "A renamed profile of the same content has everything."
    assert not missing(Lab(load_profile('smoke').model_copy(update=dict(name='mine', label='mine')), store=full))


def test_stages_that_tables_share_are_one(full):
    lab = Lab('smoke', store=full)
    assert lab.recipe['DPO v2'].inputs['start'] == 'DPO v1'
    assert lab.recipe['Cand. 1 step 1'].inputs['ref_ultrafeedback_clean'] == lab.recipe['DPO v1'].inputs['ref_ultrafeedback_clean']
    assert len(list((full/'ref').iterdir())) == sum(s.kind == 'ref' for s in lab.recipe.values())


def test_a_damaged_adapter_is_rebuilt_and_said_so(copy, capfd):
    lab = Lab('smoke', store=copy)
    before = contents(lab)
    (lab.build('SFT v3').path/'adapter'/'adapter_model.safetensors').write_bytes(b'no adapter')
    fresh = Lab('smoke', store=copy)
    fresh.run()
    assert contents(fresh) == before                           # the same again, so what was built from it still holds
    assert 'SFT v3 is damaged' in capfd.readouterr().err
    assert [p.name.split('-')[0] for p in (copy/'damaged').iterdir()] == ['sft']


def test_two_runs_at_once_build_each_stage_once(tmp_path):
    code = RUN.replace(".run()", ".run(['SFT v1', 'SFT v2', 'SFT v3 + v4'])")
    ps = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'s')], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [p.communicate(timeout=300)[1] for p in ps]
    assert [p.returncode for p in ps] == [0, 0] and 'waiting' in ''.join(errors)
    lab = Lab('smoke', store=tmp_path/'s')
    assert sorted(a.manifest['name'] for a in lab.store.entries()) == sorted(lab.needs(['SFT v1', 'SFT v2', 'SFT v3 + v4']))


def test_joint_mode_trains_on_all_pairs_against_the_sft_model(copy):
    lab = Lab(changed(dpo=dict(mode='joint')), store=copy)
    assert lab.recipe['DPO v2'].inputs['start'] == 'SFT v3' and 'DPO v3 step 1' not in lab.recipe
    log = lab.log('DPO v2')
    rows = sum(len(lab.rows(f'data/{d}')) for d in ('ultrafeedback_clean', 'synth_math_alignment'))
    assert len(log) == rows/lab.profile.dpo.batch_size and abs(log['loss'][0] - .6931) < 1e-3


def test_a_model_answers_and_says_what_made_it(full):
    lab = Lab('smoke', store=full)
    assert isinstance(lab['Merge v4'].generate('How many?', max_new_tokens=4), str)
    made = lab.show('DPO v3')
    assert made['settings']['dpo']['beta'] == lab.profile.dpo.beta and made['seed'] == 0 and made['seconds'] > 0
    assert made['inputs']['start']['name'] == 'DPO v3 step 1' and made['versions']['trl'] and re.fullmatch('[0-9a-f]{64}', made['content'])
    with pytest.raises(ValueError, match="did you mean 'SFT v3'"): lab.build('SFTv3')
    with pytest.raises(ValueError, match='not a model'): lab.point('bench/arc')


def test_scores_are_complete_fractions(full):
    s = Lab('smoke', store=full).scores()
    assert s.groupby('model').size().eq(7).all() and s['model'].nunique() == 16
    assert s['score'].between(0, 1).all() and s['n'].eq(load_profile('smoke').eval.n_items).all() and not s.isna().any().any()
    assert isinstance(s, pd.DataFrame)
