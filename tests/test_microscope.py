"The microscope's numbers by hand, and the hand-over from four bits."
import json
import math
import weakref
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import solar_repro.merge as merging
import solar_repro.stages.quantization as study
from solar_repro.dpo import load_policy
from solar_repro.models.checkpoints import compare, together
from solar_repro.models.divergence import dequantized, kl_divergence, kl_summary, log_probs, probe_of
from solar_repro.models.adapters import AdaptedModel, average, materialize, save_adapter
from solar_repro.models.loading import load_base, load_tokenizer, quiet
from solar_repro.core.config import load_profile
from solar_repro.stages.graph import DEQUANTIZED, build_graph
from solar_repro.stages.quantization import MERGED_ONTO, quantization_table
from solar_repro.pipeline.experiment import Experiment
from solar_repro.merging.methods import Numbers
from solar_repro.merge import geometry_of, merge_models, rounded
from solar_repro.paper import H6_TASKS
from solar_repro.tiny.base import random_base

smoke = load_profile('smoke')
ROWS = [dict(prompt='What is 2 + 3?', completion='5'), dict(prompt='7 + 9 =', completion='7 + 9 = 16.'),
        dict(prompt='What is 10 - 4?', completion='10 - 4 = 6.')]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    with quiet(): return random_base(tmp_path_factory.mktemp('base'))


def adapter(folder, row, column, size=1., module='mlp.up_proj', shape=(128, 64)):
    "An adapter that changes one weight of one matrix."
    A, B = torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)
    A[0, column], B[row, 0] = 1., size
    name = f'base_model.model.model.layers.0.{module}'
    return save_adapter({f'{name}.lora_A.weight': A, f'{name}.lora_B.weight': B}, 1, 1, folder)


def random_adapter(folder, seed, size=.05):
    g, t = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for m, (n_out, n_in) in dict(up_proj=(128, 64), down_proj=(64, 128)).items():
            name = f'base_model.model.model.layers.{layer}.mlp.{m}'
            t |= {f'{name}.lora_A.weight': torch.randn(4, n_in, generator=g),
                  f'{name}.lora_B.weight': torch.randn(n_out, 4, generator=g)*size/2}
    return save_adapter(t, 4, 4, folder)


def geometry(a, b, base): return geometry_of(dict(a=a, b=b), base)[0]


def test_changes_at_right_angles_and_on_a_line(base, tmp_path):
    across = [AdaptedModel(base, ((adapter(tmp_path/f'{r}', r, 0, size), 1.),)) for r, size in ((0, 3.), (1, 4.))]
    g = geometry(*across, base).set_index('tensor').loc['model.layers.0.mlp.up_proj.weight']
    assert g.angle_change_deg == pytest.approx(90, abs=1e-3) and g.distance == pytest.approx(5, rel=1e-5)      # 3, 4, 5
    assert (g.change_a, g.change_b) == pytest.approx((3, 4), rel=1e-5)
    three = AdaptedModel(base, ((tmp_path/'0', 2.),)); less = AdaptedModel(base, ((tmp_path/'0', -1.),))
    line = lambda a, b: together(geometry(a, b, base), None).iloc[0]
    assert line(across[0], three).angle_change_deg == pytest.approx(0, abs=.05)
    assert line(across[0], less).angle_change_deg == pytest.approx(180, abs=.05)
    assert line(across[0], across[0]).distance == 0


def test_points_and_checkpoints_on_disk_compare_alike(base, tmp_path):
    a, b = (AdaptedModel(base, ((random_adapter(tmp_path/str(k), k), 1.),)) for k in (1, 2))
    for name, p in dict(a=a, b=b).items(): materialize(p).save_pretrained(tmp_path/f'on disk {name}')
    mine = geometry(a, b, base)
    theirs = compare(tmp_path/'on disk a', tmp_path/'on disk b', base)
    assert len(mine) > 10
    mine, theirs = (x.sort_values('tensor', ignore_index=True) for x in (mine, theirs))
    pd.testing.assert_frame_equal(mine, theirs, rtol=1e-9)


def test_a_slerp_compares_with_what_it_was_made_of(base, tmp_path):
    a, b = (AdaptedModel(base, ((random_adapter(tmp_path/str(k), k), 1.),)) for k in (1, 2))
    merge_models([a, b], 'slerp', Numbers(t=.5), tmp_path/'half')
    to = lambda p: together(geometry(p, AdaptedModel(tmp_path/'half'), base), None).distance.item()
    assert to(a) == pytest.approx(to(b), rel=.1) and 0 < to(average([a, b], [.5, .5])) < to(a)/2
    other = tmp_path/'other'; other.mkdir()
    from safetensors.torch import load_file, save_file
    w = load_file(base/'model.safetensors')
    w['renamed'] = w.pop('model.norm.weight')
    save_file(w, other/'model.safetensors')
    with pytest.raises(ValueError, match='same tensors'): geometry(a, AdaptedModel(other), base)


def test_kl_by_hand(base):
    fair, bent = torch.tensor([[.5, .5], [.9, .1]]).log(), torch.tensor([[.25, .75], [.9, .1]]).log()
    assert kl_divergence(fair, bent).tolist() == pytest.approx([.5*math.log(4/3), 0], abs=1e-7)
    d = kl_summary(fair, bent)
    assert d['kl'] == pytest.approx(.25*math.log(4/3), abs=1e-7)
    assert d['kl_max'] == pytest.approx(.5*math.log(4/3), abs=1e-7)
    never = torch.tensor([[1., 0.]]).log()
    assert kl_divergence(never, torch.tensor([[.5, .5]]).log()).item() == pytest.approx(math.log(2), abs=1e-7)
    said = log_probs(materialize(AdaptedModel(base)), probe_of(ROWS, base, smoke.template, 64))
    assert kl_divergence(said, said).max() < 1e-6
    with pytest.raises(ValueError, match='one vocabulary'): kl_divergence(said, said[:, 1:])


def test_small_changes_lose_more_by_rounding(base, tmp_path):
    far, near = (rounded(AdaptedModel(base, ((random_adapter(tmp_path/n, 1, size), 1.),)))
                 for n, size in (('far', 1.), ('near', 1e-4)))
    share = lambda r: math.sqrt((r.lost**2).sum()/(r.change**2).sum())
    assert len(far) == len(near) == 4 and share(far) < .01 < share(near)


def test_each_sweep_reads_every_file_once_a_model(base, tmp_path, monkeypatch):
    "Of a base in shards: it, two models on it and their SLERP; and once to round one."
    with quiet(): load_base(base).save_pretrained(tmp_path/'base', max_shard_size='200KB')
    a, b = (AdaptedModel(tmp_path/'base', ((random_adapter(tmp_path/str(k), k), 1.),)) for k in (0, 1))
    merge_models([a, b], 'slerp', Numbers(t=.5), tmp_path/'slerp')
    files = {d: sorted((tmp_path/d).glob('*.safetensors')) for d in ('base', 'slerp')}
    opened, read = Counter(), merging.safe_open
    monkeypatch.setattr(merging, 'safe_open', lambda file, how: opened.update([file]) or read(file, how))
    geometry_of(dict(a=a, b=b, slerp=AdaptedModel(tmp_path/'slerp')), tmp_path/'base')
    assert len(files['base']) > 2 and opened == {**dict.fromkeys(files['base'], 3), **dict.fromkeys(files['slerp'], 1)}
    opened.clear()
    rounded(a)
    assert opened == dict.fromkeys(files['base'], 1)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_dequantised_and_merged_is_what_was_trained(base, tmp_path, dtype):
    point = AdaptedModel(base, ((random_adapter(tmp_path/'adapter', 3), 1.),))
    numerics = smoke.sft.model_copy(update=dict(compute_dtype=dtype))
    probe = probe_of(ROWS, base, smoke.template, 64)
    trained = log_probs(load_policy(point, tmp_path/'one', numerics, 'cpu').base_model.model.eval(), probe)
    back = AdaptedModel(dequantized(base, tmp_path/'back', dtype), point.adapters)
    eps = dict(float32=1e-4, bfloat16=.15)[dtype]   # sums in another order; bf16 arithmetic against float32
    assert (log_probs(materialize(back), probe)-trained).abs().max() < eps
    full = log_probs(materialize(point), probe)
    assert kl_summary(trained, full)['kl'] > 1e-6                               # four bits are not nothing
    if dtype == 'float32': assert (full-trained).abs().max() > 10*eps
    assert load_tokenizer(back.base)('2 + 3')['input_ids'] == load_tokenizer(base)('2 + 3')['input_ids']


def profile(tmp_path, merge, more=''):
    (tmp_path/'own.toml').write_text(f'extends = "smoke"\n{more}\n[merge]\n{merge}\n')
    return load_profile(tmp_path/'own.toml')


def test_the_choice_is_strict(tmp_path):
    assert profile(tmp_path, '').merge.merge_onto == 'original'
    for wrong in ('"dequantised"', '"nf4"', 'true'):
        with pytest.raises(ValueError, match='merge.merge_onto'): profile(tmp_path, f'merge_onto = {wrong}')
    with pytest.raises(ValueError, match="did you mean 'merge_onto'"): profile(tmp_path, 'merge_on = "original"')
    half = profile(tmp_path, 'merge_onto = "dequantized"', '[dpo]\nnf4 = false')
    with pytest.raises(ValueError, match='both trainings in four bits'): build_graph(half)
    full_weights = profile(tmp_path, '', '[sft]\nnf4 = false\n[dpo]\nnf4 = false')
    with pytest.raises(ValueError, match="'SFT v3' is trained on full weights"):
        Experiment(full_weights, store=tmp_path/'store').quantization()


def test_the_choice_touches_evaluations_and_slerp_but_no_training(tmp_path):
    full, back = (build_graph(profile(tmp_path, f'merge_onto = "{h}"')) for h in ('original', 'dequantized'))
    assert set(back)-set(full) == {DEQUANTIZED}
    moved = {n for n in full if full[n] != back[n]}
    evals = {n for n, s in full.items() if s.kind in ('eval', 'own') and n.split('/')[1] not in ('base', 'Merge v4')}
    study = 'quantization/SFT v3'
    assert moved == {'Merge v4', study} | evals and back[study].settings['known'] == 'dequantized'
    assert all(back[n].inputs['merge_onto'] == DEQUANTIZED
               and back[n].settings['merge_onto'] == 'dequantized' for n in moved - {study})
    plain = build_graph(profile(tmp_path, '', '[sft]\nnf4 = false\n[dpo]\nnf4 = false'))
    assert not any('merge_onto' in s.settings for s in plain.values())     # there is nothing to choose


def test_both_ways_run_and_say_so(full, tmp_path):
    import shutil
    shutil.copytree(full, tmp_path/'store')
    one, two = (Experiment(profile(tmp_path, f'merge_onto = "{h}"'), store=tmp_path/'store')
                for h in ('original', 'dequantized'))
    two.scores(['SFT v3'])
    score = lambda exp: json.loads((exp.build('eval/SFT v3/hellaswag').path/'score.json').read_text())
    for exp, h in ((one, 'original'), (two, 'dequantized')):
        for n in 'eval/SFT v3/hellaswag', 'Merge v4': assert exp.show(n)['settings']['merge_onto'] == h
    assert 'merge_onto' in two.show('Merge v4')['inputs'] and two.model('SFT v3').base != one.model('SFT v3').base
    assert two.model('SFT v3').adapters == one.model('SFT v3').adapters          # the same training
    said = [exp.items('SFT v3', 'hellaswag').loglikelihoods.explode().astype(float) for exp in (one, two)]
    assert not said[0].equals(said[1]) and score(one)['n'] == score(two)['n']
    x, y = one.quantization(), two.quantization()
    for t in (x, y):
        t = t.set_index('way')
        assert list(t.index) == list(MERGED_ONTO) and t.loc['as trained', 'kl'] < 1e-9
        assert t.loc['dequantized', 'kl'] < 1e-6 < t.loc['original', 'kl']
    pd.testing.assert_frame_equal(x, y, atol=1e-6)                         # whichever is known already
    before = {a.key for a in one.store.entries()}
    one.quantization()
    assert {a.key for a in one.store.entries()} == before                  # kept
    for n in DEQUANTIZED, 'Merge v4', 'eval/SFT v3/hellaswag':               # whole for the next process, too
        assert Experiment(two.profile, store=tmp_path/'store').find(n), n


def test_each_model_is_gone_before_the_next_is_loaded(base, tmp_path, monkeypatch):
    "The one in four bits is not in memory while its base is unpacked, nor a merged one while the next is loaded."
    point, loaded, way = AdaptedModel(base, ((random_adapter(tmp_path/'adapter', 3), 1.),)), [], []
    def load(make):
        assert [m() for m in loaded] == [None]*len(loaded), f'a model before {len(loaded)}'
        model = make()
        loaded.append(weakref.ref(model))
        return model
    def trained(*args):
        model = load(lambda: load_policy(*args).base_model.model)
        return SimpleNamespace(base_model=SimpleNamespace(model=model))
    def back(base, out, *numbers):
        assert loaded[0]() is None
        return dequantized(base, out, *numbers)
    def items(model, base, name, task, *rest):
        way.append((name, task, base))
        return dict(protocols=dict(p=dict(score=.5, se=.1))), pd.DataFrame(dict(doc_id=[0], score=[.5]))
    for name, stub in dict(adapted_model=lambda *args: point, load_policy=trained, dequantized=back, _items=items,
                           probe_of=lambda rows, *args: probe_of(ROWS, *args)).items():
        monkeypatch.setattr(study, name, stub)
    context = SimpleNamespace(store=None, on_progress=lambda *done: None,
                              materialize=lambda adapted: load(lambda: materialize(adapted)))
    settings = build_graph(smoke)['quantization/SFT v3'].settings
    study.build_quantization(tmp_path, settings, dict(model=SimpleNamespace(kind='sft')), context)
    assert len(loaded) == 3 and list(dict.fromkeys(w for w, *_ in way)) == list(MERGED_ONTO)
    assert [b for *_, b in way[::len(H6_TASKS)]] == [base, tmp_path/'scratch'/'base', base]


def test_table_by_hand():
    items = lambda w, right: [dict(way=w, task=t, doc_id=i, score=float(i < n))
                              for t, n in zip(H6_TASKS, right) for i in range(4)]
    its = pd.DataFrame(items('as trained', [2]*6)+items('full', [2]*5+[3]))
    sc = its.groupby(['way', 'task'], as_index=False)['score'].mean().assign(se=.25)
    kl = pd.DataFrame([dict(way='as trained', kl=0.), dict(way='full', kl=.1)])
    got = quantization_table(kl, sc, its).set_index('way').loc['full']
    assert (got.h6, got.h6_change, got.change_se, got.items_changed) == pytest.approx((3.25/6, .25/6, .25/6, 1))
