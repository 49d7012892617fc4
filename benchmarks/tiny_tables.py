"""Where the time of `make tables` goes: the recipe on a cold temporary store, stage by stage, and how much is arithmetic.

    python benchmarks/tiny_tables.py [--profile tiny] [--seed 0]

The timed run is undisturbed. After it one stage of each kind that computes with a model (the one of median time, and for
evaluation one a benchmark) is done again under torch's FLOP counter, untimed. Arithmetic is what these FLOPs would take at
the rate of a large float32 matrix product measured in this process with the profile's threads; other stages of a kind are
taken to spend the same share of their time on it. So it is a lower bound: small products run slower than large ones, and
softmax, normalisation, activations, dequantisation and the optimiser count as overhead.
"""
import argparse
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

for name, value in dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg').items():
    os.environ.setdefault(name, value)                       # before torch is imported

import pandas as pd

from solar_repro.lab.recipe import BUILDERS, Tools
from solar_repro.lab.run import Lab

MODEL_KINDS = 'sft', 'ref', 'dpo', 'eval'                    # the others run no model
UNITS = {'s': '{:.1f}', '% of run': '{:.1f}', 'GFLOP': '{:.0f}', 'arithmetic s': '{:.1f}', 'arithmetic %': '{:.0f}'}


def import_all() -> float:
    "Import what the stages use, so that no stage is charged for it; seconds."
    began = time.perf_counter()
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer
    import solar_repro.dpo
    import solar_repro.eval
    import solar_repro.merge
    import solar_repro.sft
    import solar_repro.tiny.base
    return time.perf_counter() - began


def matmul_rate(
    threads: int,           # of the profile
    n: int = 1024,          # side of the matrices
    seconds: float = 1.,    # how long to measure
) -> float:                 # FLOP a second, the best of many products
    "What a large float32 matrix product reaches here."
    import torch
    torch.set_num_threads(threads)
    a, b = torch.randn(n, n), torch.randn(n, n)
    best, until = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2*n**3/best


def counter():
    "torch's FLOP counter, taught the kernels of ours that it does not know: attention on CPUs, and products with 4-bit weights."
    import bitsandbytes                                      # defines its kernels
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
    aten, bnb = torch.ops.aten, torch.ops.bitsandbytes

    def product_4bit(a, b, shape_b, *_, out_shape=None, **__):
        "(..., in) times a packed (out, in)."
        return 2*math.prod(a)*shape_b[0]

    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v),
        bnb.gemm_4bit: product_4bit, bnb.gemv_4bit: product_4bit})


def flops(lab: Lab, name: str) -> int:
    "Do a stage again in a folder of its own, under the counter."
    stage = lab.recipe[name]
    inputs = {role: lab.build(i) for role, i in stage.inputs.items()}
    if stage.kind == 'eval':                                 # made once a model, so not part of any one benchmark
        lab.materialized(lab.point(stage.inputs['model']))
    with tempfile.TemporaryDirectory() as out, counter() as count:
        BUILDERS[stage.kind](Path(out), stage.settings, inputs, Tools(lab.store, lambda done, total: None, lab.materialized))
    return count.get_total_flops()


def group(stage: str, kind: str) -> str:
    "Stages that spend their time alike."
    return f"eval {stage.rsplit('/', 1)[1]}" if kind == 'eval' else kind


def by_group(
    lab: Lab,
    status: pd.DataFrame,   # of a finished run
    total_s: float,         # wall time of the run
    rate: float,            # FLOP a second
) -> pd.DataFrame:          # one row a group
    "Seconds and arithmetic of each kind of stage, and of each benchmark."
    rows = []
    for name, stages in status.groupby([group(s, k) for s, k in zip(status['stage'], status['kind'])], sort=False):
        seconds, share = stages['seconds'].sum(), 0.
        if stages['kind'].iloc[0] in MODEL_KINDS:
            sample = stages.sort_values('seconds', kind='stable').iloc[len(stages)//2]
            print(f'counting: {sample["stage"]}', file=sys.stderr)
            share = flops(lab, sample['stage'])/rate/max(sample['seconds'], .01)
        rows.append({'what': name, 'stages': len(stages), 's': seconds, '% of run': 100*seconds/total_s, 'GFLOP': share*seconds*rate/1e9,
                     'arithmetic s': share*seconds, 'arithmetic %': 100*share})
    return pd.DataFrame(rows)


def other_time(
    table: pd.DataFrame,    # of `by_group`
    total_s: float,         # wall time of the run
    import_s: float,        # of it, imports
) -> pd.DataFrame:          # the table with imports, the store and the sum
    "Add what no stage is charged for, and the sum."
    store_s = total_s - import_s - table['s'].sum()
    rest = [{'what': what, 'stages': '', 's': s, '% of run': 100*s/total_s, 'GFLOP': 0., 'arithmetic s': 0., 'arithmetic %': 0.}
            for what, s in (('imports', import_s), ('store, hashes, scheduling', store_s))]
    arithmetic_s = table['arithmetic s'].sum()
    rest.append({'what': 'all', 'stages': table['stages'].sum(), 's': total_s, '% of run': 100., 'GFLOP': table['GFLOP'].sum(),
                 'arithmetic s': arithmetic_s, 'arithmetic %': 100*arithmetic_s/total_s})
    return pd.concat([table, pd.DataFrame(rest)], ignore_index=True)


def show(table: pd.DataFrame) -> None:
    print(table.to_string(index=False, formatters={k: u.format for k, u in UNITS.items() if k in table}), end='\n\n')


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--profile', default='tiny', help='name of a profile or path of a TOML file')
    ap.add_argument('--seed', type=int, help="in place of the profile's seed")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        import_s = import_all()
        lab = Lab(args.profile, args.seed, store=Path(folder) / 'store')
        threads = lab.profile.machine.threads
        rates = [matmul_rate(threads)]
        measured = time.perf_counter()
        lab.run()
        total_s = time.perf_counter() - measured + import_s
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
        rates.append(matmul_rate(threads))
        status = lab.status()
        single = status[status['kind'] != 'eval']
        print(f'{lab.label}: {len(status)} stages on a cold store, {os.cpu_count()} CPUs, {threads} threads\n')
        show(pd.DataFrame({'stage': single['stage'], 'kind': single['kind'], 's': single['seconds'], '% of run': 100*single['seconds']/total_s}))
        show(other_time(by_group(lab, status, total_s, max(rates)), total_s, import_s))
        print(f'arithmetic: FLOPs by torch\'s counter on one stage a row, at {max(rates)/1e9:.0f} GFLOP/s (best 1024 x 1024 float32 product; '
              f'before and after: {rates[0]/1e9:.0f}, {rates[1]/1e9:.0f})')
        print(f'peak memory of the process: {peak_gib:.2f} GiB; counting and measuring, outside the run: {time.perf_counter() - began - total_s:.0f} s')


if __name__ == '__main__':
    main()
