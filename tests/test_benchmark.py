"What benchmarks/tiny_tables.py counts, against products counted by hand."
import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch

from solar_repro.lab.model import load_base, materialize
from solar_repro.lab.run import Lab

BENCH = runpy.run_path(str(Path(__file__).resolve().parents[1] / 'benchmarks' / 'tiny_tables.py'))


@pytest.mark.parametrize('nf4', [False, True])
def test_flops_are_two_a_token_and_weight(tmp_path, nf4):
    "Forward: 2 a token and weight of the linear layers, and attention's two products; 4-bit weights count like others."
    lab = Lab('smoke', store=tmp_path / 'store')
    point = lab.point('base')
    model = materialize(point)
    c, batch, seq = model.config, 2, 50
    linear = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)}
    expected = 2*batch*seq*sum(linear.values()) + 4*batch*seq*seq*c.hidden_size*c.num_hidden_layers
    if nf4:
        model = load_base(point.base, nf4=True)
    with BENCH['counter']() as count, torch.inference_mode():
        model(input_ids=torch.zeros(batch, seq, dtype=torch.long))
    assert count.get_total_flops() == expected


def test_rows_add_up():
    "10 s of a run of 20 s stand in stages, 4 s are imports, so 6 s are left for the store; a quarter is arithmetic."
    table = pd.DataFrame([{'what': 'sft', 'stages': 4, 's': 10., '% of run': 50., 'GFLOP': 100., 'arithmetic s': 5., 'arithmetic %': 50.}])
    done = BENCH['other_time'](table, 20., 4.).set_index('what')
    assert done['s'].to_dict() == {'sft': 10., 'imports': 4., 'store, hashes, scheduling': 6., 'all': 20.}
    assert done.loc['all', 'arithmetic %'] == 25. and done.loc['all', 'stages'] == 4
