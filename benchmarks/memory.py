"""Planned and measured peaks of training memory: the tiny base on the CPU, and known shapes with random weights.

Measured: bytes of all live tensors, as torch's dispatcher sees them come and go, over whole training runs of
`train_sft` and `train_dpo`; and, beside it, by how much the process's resident memory rose at its peak, which holds
the allocator's slack too. The tile of logits is allocated in full but touched as far as the vocabulary goes, so
resident memory may rise by less; and by more, where a whole float32 base is read before it is quantized.
Run: python benchmarks/memory.py ; writes benchmarks/results/memory.json (with --only tiny, or --compare 0, it writes
nothing)
On a GPU: python benchmarks/memory.py --only solar ; SOLAR-10.7B's shape with random weights (22 GB of disk), where
the peak is what the card's allocator handed out, and the passes are those of the profile a100.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from kept import keep
from shapes import SMOLLM2_135M, SOLAR, random_base

# base, kind, nf4, compute dtype, microbatches, rows a step, max_length, dropout, checkpointing, and the most tokens of
# a microbatch where the profile says that instead of their number
CASES = [
    ('tiny', 'sft', True, 'float32', 1, 6, 256, 0.0, False),
    ('tiny', 'sft', True, 'float32', 1, 6, 256, 0.05, False),
    ('tiny', 'dpo', True, 'float32', 1, 16, 256, 0.0, False),
    ('tiny', 'sft', True, 'float32', 2, 8, 512, 0.0, True),
    ('smol', 'sft', True, 'float32', 1, 1, 256, 0.0, False),
    ('smol', 'sft', True, 'float32', 2, 2, 256, 0.05, False),
    ('smol', 'sft', True, 'bfloat16', 1, 2, 256, 0.0, False),
    ('smol', 'sft', False, 'float32', 1, 2, 128, 0.0, False),
    ('smol', 'sft', True, 'float32', 1, 2, 512, 0.0, True),
    ('smol', 'dpo', True, 'float32', 1, 1, 192, 0.0, False),
    ('solar', 'sft', True, 'bfloat16', 4, 4, 2048, 0.05, False),
    ('solar', 'sft', True, 'bfloat16', 1, 4, 2048, 0.05, True),
    ('solar', 'dpo', True, 'bfloat16', 4, 4, 2048, 0.0, False),
    ('solar', 'sft', False, 'bfloat16', 4, 4, 2048, 0.05, False),
    ('tiny', 'dpo', True, 'float32', 1, 8, 256, 0.0, False, 1880),
    ('smol', 'dpo', True, 'float32', 1, 2, 192, 0.0, False, 344),
    ('solar', 'dpo', True, 'bfloat16', 1, 4, 2048, 0.0, False, 4096),
    ('tiny', 'sft', True, 'float32', 1, 6, 256, 0.0, False, 1024),
    ('smol', 'sft', True, 'float32', 1, 4, 256, 0.0, False, 512),
]
RANK = dict(tiny=16, smol=16, solar=64)
SIZES = dict(smol=SMOLLM2_135M, solar=SOLAR)


def tracker():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        "Counts the bytes of the storages that exist."
        def __init__(self): super().__init__(); self.sizes, self.now, self.peak = {}, 0, 0

        def see(self, t):
            s = t.untyped_storage(); k = s._cdata
            if s.device.type == 'meta' or k in self.sizes: return
            self.sizes[k] = s.nbytes(); self.now += self.sizes[k]; self.peak = max(self.peak, self.now)
            weakref.finalize(s, self.gone, k)

        def gone(self, k): self.now -= self.sizes.pop(k, 0)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor): self.see(t)
            return out
    return Live()


def meter(device):
    if device == 'cpu': return tracker()
    import torch

    class OnCard:
        "The most that the card's allocator had handed out."
        peak = 0
        def __enter__(self): torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        def __exit__(self, *error): self.peak = torch.cuda.max_memory_allocated()
    return OnCard()


def make_base(which, out):
    from solar_repro.tiny.world import shipped_base
    if which == 'tiny': return shipped_base()
    return random_base(out, SIZES[which], *(('bfloat16', 'cuda') if which == 'solar' else ()))


def resident(key):
    return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key))


def one(case, base):
    from solar_repro.dpo import reference_logps, train_dpo
    from solar_repro.models.adapters import AdaptedModel
    from solar_repro.core.config import load_profile
    from solar_repro.sft import train_sft
    which, kind, nf4, dtype, passes, rows, length, dropout, again, *budget = case
    device = 'cuda' if which == 'solar' else 'cpu'
    p = load_profile('tiny')
    common = dict(
        nf4=nf4,
        compute_dtype=dtype,
        microbatches=passes,
        batch_size=rows,
        max_length=length,
        activation_checkpointing=again,
        warmup_ratio=0.0,
        max_tokens_per_microbatch=budget[0] if budget else None,
    )
    sft = p.sft.model_copy(update=dict(**common, lora_dropout=dropout, lora_r=RANK[which], lora_alpha=16))
    dpo = p.dpo.model_copy(update=common)
    words = json.loads((Path(base)/'tokenizer.json').read_text())['model']['vocab']
    word = sorted(w for w in words if w.isalpha() and w.islower())
    say = lambda n: ' '.join(random.choices(word, k=n))
    random.seed(0)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        if kind == 'sft':
            data = [
                dict(prompt=say(20), completion=say(length - 40)) for _ in range(2 * rows)
            ]  # two steps; a packed row is one example
            before, live = resident('VmRSS'), meter(device)
            with live: train_sft(Path(base), data, d, sft, p.template, 0, device)
        else:
            data = [dict(prompt=say(20), chosen=say(length - 40), rejected=say(length - 40)) for _ in range(2*rows)]
            train_sft(
                Path(base),
                [dict(prompt='a', completion=say(3))],
                d / 'sft',
                sft.model_copy(update=dict(batch_size=1, microbatches=1, max_tokens_per_microbatch=None)),
                p.template,
                0,
                device,
            )
            point = AdaptedModel(Path(base), ((d/'sft'/'adapter', 1.),))
            ref = reference_logps(point, data, dpo, p.template, device)
            before, live = resident('VmRSS'), meter(device)
            with live: train_dpo(point, data, ref, d/'dpo', dpo, p.template, 0, device)
    return dict(
        tracked=live.peak,
        resident=resident('VmHWM') - before,
        n_tok=(rows // passes) * (length - 12) * (2 if kind == 'dpo' else 1),
    )


def compare(i, base):
    "Planned and measured, of one case; the training runs in a process of its own."
    from solar_repro.planning.cost_model import shape_of, train_memory
    r = subprocess.run(
        [sys.executable, __file__, '--case', str(i), '--base', str(base)], capture_output=True, text=True
    )
    if r.returncode: sys.exit(r.stderr[-2000:])
    m = json.loads(r.stdout.splitlines()[-1])
    which, kind, nf4, dtype, passes, rows, length, dropout, again, *budget = CASES[i]
    n_tok = budget[0] if budget else rows//passes*length*(2 if kind == 'dpo' else 1)
    parts = train_memory(
        shape_of(base),
        nf4,
        dtype,
        RANK[which],
        dropout if kind == 'sft' else 0.0,
        n_tok,
        None if budget else passes,
        again,
        'cuda' if which == 'solar' else 'cpu',
    )
    planned = sum(parts.values())
    return dict(
        base=which,
        kind=kind,
        nf4=nf4,
        dtype=dtype,
        passes=passes,
        rows=rows,
        max_length=length,
        dropout=dropout,
        checkpointing=again,
        max_tokens_per_microbatch=budget[0] if budget else None,
        planned_mib=round(planned / 2**20, 1),
        measured_mib=round(m['tracked'] / 2**20, 1),
        resident_mib=round(m['resident'] / 2**20, 1),
        ratio=round(planned / m['tracked'], 3),
        parts_mib={k: round(v / 2**20, 1) for k, v in parts.items()},
    )


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--only', choices=('tiny', 'smol', 'solar'))
    a.add_argument('--case', type=int)
    a.add_argument('--base')
    a.add_argument('--compare', type=int)
    a = a.parse_args()
    if a.case is not None: return print(json.dumps(one(CASES[a.case], a.base)))
    out = []
    with tempfile.TemporaryDirectory() as d:
        bases = {}
        for i, c in enumerate(CASES):
            if c[0] != a.only and (a.only or c[0] == 'solar') or a.compare not in (None, i): continue
            if c[0] not in bases: bases[c[0]] = make_base(c[0], Path(d)/c[0])
            out.append(compare(i, bases[c[0]])); print(json.dumps(out[-1]), flush=True)
    if a.compare is not None: return 0
    if a.only is None: keep('memory', found=dict(machine=f'{platform.machine()}, CPU only', cases=out))
    ratios = [o['ratio'] for o in out]
    print(f'planned / measured: {min(ratios)} to {max(ratios)}')
    return int(not all(.85 < r < 1.15 for r in ratios))


if __name__ == '__main__': sys.exit(main())
