"What benchmarks/tiny_tables.py counts, against products counted by hand and by torch."
import math
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from solar_repro.models.loading import load_base
from solar_repro.models.adapters import materialize
from solar_repro.core.config import load_profile
from solar_repro.pipeline.experiment import Experiment
from solar_repro.sft import train_sft

BENCH = runpy.run_path(str(Path(__file__).resolve().parents[1] / 'benchmarks' / 'tiny_tables.py'))
ATEN = torch.ops.aten


def counter() -> FlopCounterMode:
    "torch's counter, taught the two kernels that it does not know."
    return FlopCounterMode(display=False, custom_mapping={
        ATEN._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v),
        torch.ops.bitsandbytes.gemm_4bit: lambda a, b, shape, *_, out_shape=None, **__: 2*math.prod(a)*shape[0]})


@pytest.mark.parametrize('nf4', [False, True])
def test_a_forward_costs_two_flops_a_token_and_weight(tmp_path, nf4):
    "2 a token and weight of the linear layers, and attention's two products; 4-bit weights count like others."
    point = Experiment('smoke', store=tmp_path / 'store').model('base')
    model = materialize(point)
    c, batch, seq = model.config, 2, 50
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    expected = 2*batch*seq*weights + 4*batch*seq*seq*c.hidden_size*c.num_hidden_layers
    if nf4:
        model = load_base(point.base, nf4=True)
    seen = Counter()
    with BENCH['products'](seen), counter() as count, torch.inference_mode():
        model(input_ids=torch.zeros(batch, seq, dtype=torch.long))
    assert BENCH['flops'](seen) == count.get_total_flops() == expected


def test_a_qlora_run_counts_every_product(tmp_path):
    "TRL's loss multiplies with the vocabulary's weights itself; without that a third of this run would be missed."
    exp, p = Experiment('smoke', store=tmp_path / 'store'), load_profile('smoke')
    base, rows, seen = exp.build('base').path, exp.rows('data/alpaca_gpt4'), Counter()
    with BENCH['products'](seen), counter() as count:
        train_sft(base, rows, tmp_path / 'out', p.sft, p.template, 0)
    found = {str(op): n for op, n in count.get_flop_counts()['Global'].items()}
    attention = found.pop('aten._scaled_dot_product_flash_attention_for_cpu')
    again = found.pop('aten._scaled_dot_product_flash_attention_for_cpu_backward')
    assert set(found) == {'aten.mm', 'bitsandbytes.gemm_4bit'} and again == 2.5*attention
    # of the backward's five products one is the forward's, done again
    assert BENCH['flops'](seen) == sum(found.values()) + 3*attention
