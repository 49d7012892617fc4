"""Adapters in all the forms that PEFT writes and loads: what it passes over is refused, the rest is merged exactly."""
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from solar_repro.merging.config import from_yaml, merge_config
from solar_repro.merging.export import export, merge_adapters
from solar_repro.models.adapters import AdaptedModel, CHOICE, read_adapter
from solar_repro.reports.cli import main
from solar_repro.tiny.base import random_base

MODULES = [f'model.layers.{i}.self_attn.{m}_proj' for i in (0, 1) for m in 'qv']


def adapter(folder, seed, names=MODULES, dtype=torch.float32, **config):
    g = torch.Generator().manual_seed(seed)
    t = {f'base_model.model.{n}.lora_{k}.weight': torch.randn(*s, generator=g).to(dtype)
         for n in names for k, s in (('A', (2, 16)), ('B', (16, 2)))}
    folder.mkdir()
    save_file(t, folder/'adapter_model.safetensors', {'format': 'pt'})
    said = dict(peft_type='LORA', task_type='CAUSAL_LM', r=2, lora_alpha=4, target_modules=['q_proj', 'v_proj'],
                bias='none', base_model_name_or_path='org/base') | config
    (folder/'adapter_config.json').write_text(json.dumps(said))
    return folder


def merged(tmp_path, weights=(.5, .5), **config):
    "Two adapters merged, and what the result says of itself."
    two = [adapter(tmp_path/n, k, **config) for k, n in enumerate('PQ')]
    out = merge_adapters(merge_config('linear', two, weights), tmp_path/'out')
    return out, json.loads((out/'adapter_config.json').read_text())


# ---- which tensors PEFT loads ---------------------------------------------------------------------------------------
PASSED_OVER = [
    (dict(target_modules=['q_proj']), 'v_proj'),
    (dict(layers_to_transform=[0]), 'layers.1'), (dict(layers_to_transform=0), 'layers.1'),
    (dict(layers_to_transform=[0, 1], layers_pattern='h'), 'layers.0'),
    (dict(exclude_modules=['v_proj']), 'v_proj'), (dict(exclude_modules=r'.*\.1\..*'), 'layers.1'),
    (dict(target_modules=r'.*\.q_proj'), 'v_proj'), (dict(target_modules=[]), 'q_proj'),
    (dict(target_modules=None), 'does not load'), (dict(target_modules='(q_proj'), 'does not load'),
    (dict(target_modules=3), 'does not load'), (dict(layers_to_transform='0'), 'does not load'),
    (dict(target_modules='.*proj', layers_to_transform=[0, 1]), 'does not load'),
    (dict(layers_pattern='layers'), 'does not load'),
    (dict(target_modules=['q_proj', 'v_proj', 'o_proj'], init_lora_weights=False), 'o_proj')]

@pytest.mark.parametrize('config, says', PASSED_OVER, ids=lambda x: None if isinstance(x, str) else str(x)[1:-1])
def test_tensors_that_peft_passes_over_are_refused(config, says, tmp_path, capsys):
    for k, n in enumerate('PQ'): adapter(tmp_path/n, k, **config)
    status = main(['merge', '--method', 'linear', *(str(tmp_path/n) for n in 'PQ'), str(tmp_path/'out')])
    err = capsys.readouterr().err
    assert status == 2 and says in err and 'expected' in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['P', 'Q']


@pytest.mark.parametrize('head', ['', 'base_model.x.', 'base_model.model._orig_mod.', 'base_model.model.module.',
                                  'base_model.model._fsdp_wrapped_module.', 'base_model.model.model._orig_mod.'])
def test_names_that_peft_passes_over_are_refused(head, tmp_path):
    file = adapter(tmp_path/'P', 0)/'adapter_model.safetensors'
    save_file({head + n.removeprefix('base_model.model.'): t for n, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match='PEFT passes over'): read_adapter(tmp_path/'P')


@pytest.mark.parametrize('config', [
    dict(target_modules='all-linear'), dict(target_modules=r'model\.layers.*_proj'), dict(target_modules=MODULES),
    dict(target_modules=['q_proj', 'v_proj', 'o_proj']), dict(init_lora_weights=False),
    dict(layers_to_transform=[0, 1], layers_pattern=None), dict(exclude_modules=['lm_head'])], ids=str)
def test_what_peft_loads_is_merged_and_its_choice_kept(config, tmp_path):
    _, said = merged(tmp_path, **config)
    in_order = lambda v: sorted(v) if isinstance(v, list) else v
    want = dict(target_modules=['q_proj', 'v_proj']) | config
    assert {k: said[k] for k in CHOICE if k in said} == {k: in_order(want[k]) for k in CHOICE if want.get(k)}


# ---- what a merged adapter says --------------------------------------------------------------------------------------
class Deep(nn.Module):
    "Modules whose names end alike."
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.norms = nn.ModuleList([nn.ReLU()])

    def forward(self, x): return self.norms[0](self.mlp(x))


@pytest.mark.parametrize('targets', [(['mlp.0', 'mlp.2'],)*2, (['mlp.0', 'mlp.2'], r'mlp\.[02]')], ids=['one', 'two'])
def test_modules_whose_names_end_alike_are_merged_and_loaded(targets, tmp_path):
    torch.manual_seed(0)
    base, deltas = Deep(), []
    for k, t in enumerate(targets):
        model = get_peft_model(Deep(), LoraConfig(r=2, lora_alpha=4, target_modules=t))
        for n, p in model.named_parameters(): p.requires_grad_(False).normal_() if 'lora_' in n else None
        model.save_pretrained(tmp_path/f'{k}')
    out = merge_adapters(merge_config('linear', [tmp_path/'0', tmp_path/'1'], [.25, .75]), tmp_path/'out')
    def weights(folder):
        model = Deep()
        model.load_state_dict(base.state_dict())
        return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    a, b, both = (weights(f) for f in (tmp_path/'0', tmp_path/'1', out))
    for n in a: torch.testing.assert_close(both[n], .25*a[n] + .75*b[n])
    assert not torch.equal(a['mlp.0.weight'], both['mlp.0.weight'])


@pytest.mark.parametrize('config', [
    dict(task_type='FEATURE_EXTRACTION'), dict(task_type='CAUSAL_LM'), dict(task_type=None),
    dict(task_type=None, auto_mapping=dict(base_model_class='Deep', parent_library='deep'))], ids=str)
def test_the_task_is_kept(config, tmp_path):
    _, said = merged(tmp_path, **config)
    assert {k: said[k] for k in config} == config


def test_adapters_of_two_tasks_are_refused(tmp_path, capsys):
    two = [adapter(tmp_path/k, 0, task_type=k) for k in ('SEQ_CLS', 'CAUSAL_LM')]
    assert main(['merge', '--method', 'linear', *map(str, two), str(tmp_path/'out')]) == 2
    assert 'task_type is SEQ_CLS and CAUSAL_LM' in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['CAUSAL_LM', 'SEQ_CLS']


# ---- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn],
                         ids=str)
def test_factors_are_weighted_in_float32_or_wider(dtype, tmp_path):
    weights, out = (.3, .7), merged(tmp_path, (.3, .7), dtype=dtype)[0]
    def change(adapter): return {n: adapter.scale*B.double()@A.double() for n, (A, B) in adapter.factors.items()}
    p, q, both = (change(read_adapter(f)) for f in (tmp_path/'P', tmp_path/'Q', out))
    for n in both:
        want = weights[0]*p[n] + weights[1]*q[n]
        assert ((both[n] - want).norm()/want.norm()).item() < 2e-7


def test_adapters_in_a_slice_mean_all_of_their_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k, n in enumerate('PQ'): adapter(tmp_path/n, k)
    part = '{{model: {}, layer_range: [0, {}], parameters: {{weight: 1}}}}'
    text = lambda n: (f'{{merge_method: linear, slices: [{{sources: [{part.format("P", n)}, '
                      f'{part.format("Q", n)}]}}]}}')
    with pytest.raises(ValueError, match=r'layer_range \[0, 1\] of adapters of 2 layers'):
        merge_adapters(from_yaml(text(1)), tmp_path/'out')
    merge_adapters(from_yaml(text(2)), tmp_path/'out')
    assert len(read_adapter(tmp_path/'out').factors) == 4


# ---- bases and cards -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('names, base', [
    (('/x/base', 'org1/base', 'org2/base'), None), (('org1/base', '/x/base', '/x/other'), None),
    (('/x/base', 'org/base'), 'org/base'), (('C:\\models\\base', 'org/base'), 'org/base'),
    (('C:\\hub\\models--org--base\\snapshots\\c0ffee', 'org/base'), 'org/base'),
    (('{}/x/base', '{}/y/base'), None), (('{}/x/base', '{}/link'), '{}/link'), (('{}/x/base', 'org/base'), 'org/base')],
    ids=str)
def test_all_adapters_name_one_base(names, base, tmp_path):
    for n in 'xy': (tmp_path/n/'base').mkdir(parents=True)
    (tmp_path/'link').symlink_to(tmp_path/'x'/'base')
    folders = [adapter(tmp_path/f'{k}', k, base_model_name_or_path=n.format(tmp_path)) for k, n in enumerate(names)]
    merge = lambda: merge_adapters(merge_config('linear', folders), tmp_path/'out')
    if base is None:
        with pytest.raises(ValueError, match='the adapters name the bases'): merge()
    else:
        said = json.loads((merge()/'adapter_config.json').read_text())
        assert said['base_model_name_or_path'] == base.format(tmp_path)


def test_a_card_of_an_export_holds_no_markup_of_names(tmp_path):
    base = random_base(tmp_path/'base')
    out = export(AdaptedModel(base), tmp_path/'out', '<img src=x>\n# a|b', about='[x](y) <script>')
    card = (out/'README.md').read_text()
    assert '# &lt;img src=x&gt; \\# a\\|b\n' in card and '\\[x\\](y) &lt;script&gt;\n' in card
