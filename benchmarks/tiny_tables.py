"""Where the time of `make tables` goes: builds a profile's recipe on a cold temporary store and prints a line for each
kind of stage.

    python benchmarks/tiny_tables.py [--profile tiny] [--seed N] [--stages]

Notebooks are left out: their cells add to these times, and each starts a kernel. The share that is model arithmetic is
measured in two steps.

1. While the recipe runs, a hook on every module notes the shape of every matrix product that the model asks for: rows
   x in x out of each linear
   layer (adapters included), and the two products of attention. A layer's backward pass counts one more product where
   its input needs a gradient
   and one where its weight does, so that frozen weights cost what they cost. TRL multiplies with the vocabulary's
   weights without calling their
   module, so that product is noted where its result comes out. A test compares a QLoRA run's sum with torch's
   FlopCounterMode, to which it has to
   add bitsandbytes' kernel for 4-bit weights and the CPU's for attention. Attention over cached keys, one token at a
   time, is left out.
2. Afterwards, in the same process on the same threads, a bare float32 `torch.mm` of each of these shapes is timed (the
   best of three; rows rounded
   to a power of two). The arithmetic of a stage is the time that its products would take at these rates.

What remains is everything else: unpacking NF4 weights, elementwise operations, softmax over the vocabulary, the
optimiser, tokenising, checkpoints.
The hooks themselves cost a few microseconds a module.
"""

import argparse
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == '__main__': # before torch is loaded, and of this process alone
    for k, v in dict(GOMP_SPINCOUNT='30000', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', MPLBACKEND='Agg',
                     PYTHONWARNINGS='ignore', TQDM_DISABLE='1').items():
        os.environ.setdefault(k, v)


@contextmanager
def products(seen: Counter):
    "Count into `seen` every (rows, in, out) that a model multiplies, backward passes included."
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    def note(module, args, out):
        if isinstance(module, torch.nn.Linear):
            x = args[0]
            times = 1 + x.requires_grad + module.weight.requires_grad if torch.is_grad_enabled() else 1
            seen[x.numel()//module.in_features, module.in_features, module.out_features] += times
        elif type(module).__name__ == 'LoraModel' and type(out).__name__ == 'FusedCausalLMOutput':
            head = module.model.get_output_embeddings()
            seen[out.log_probs.numel(), head.in_features, head.out_features] += (
                1 + out.log_probs.requires_grad + head.weight.requires_grad
            )
        elif type(module).__name__.endswith('Attention') and hasattr(module, 'head_dim'):
            y = out[0]
            rows, tokens = y.numel()//module.head_dim, y.shape[-2]
            times = 3 if y.requires_grad else 1
            seen[rows, module.head_dim, tokens] += times
            seen[rows, tokens, module.head_dim] += times
    handle = register_module_forward_hook(note)
    try:yield
    finally: handle.remove()


def flops(seen: Counter) -> float:
    return sum(2.*r*i*o*n for (r, i, o), n in seen.items())


def bucket(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    "The shape that is timed for this one."
    rows, i, o = shape
    return 1 << (rows - 1).bit_length(), i, o


def time_products(shapes: set) -> dict:
    "Seconds a FLOP of a bare matrix product of each shape."
    import torch
    out = {}
    for rows, i, o in sorted(shapes):
        a, b = torch.randn(rows, i), torch.randn(i, o)
        torch.mm(a, b)
        repeat = max(1, min(1000, int(2e7/(rows*i*o))))
        best = float('inf')
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(repeat): torch.mm(a, b)
            best = min(best, (time.perf_counter() - began)/repeat)
        out[rows, i, o] = best/(2.*rows*i*o)
    return out


def arithmetic(seen: Counter, rate: dict) -> float:
    "Seconds that these products take by themselves."
    return sum(2.*r*i*o*n*rate[bucket((r, i, o))] for (r, i, o), n in seen.items())


def measure(profile: str, seed: int | None, each: bool) -> None:
    began = time.perf_counter()
    from solar_repro import dpo, eval, merge, sft  # noqa: F401  the heavy imports, timed by themselves
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.publishing import report
    imports = time.perf_counter() - began
    stages, kinds = [], defaultdict(Counter)         # (name, kind, seconds, products); kind -> products
    with TemporaryDirectory() as d:
        exp = Experiment(profile, seed, store=f'{d}/store')
        names = exp.needs(list(exp.graph))
        for k, name in enumerate(names):
            kind, seen, t = exp.graph[name].kind, Counter(), time.perf_counter()
            if sys.stderr.isatty():
                print(f'\r\x1b[K{k + 1} of {len(names)}: {name}', end='', file=sys.stderr, flush=True)
            with products(seen): exp.build(name)
            stages.append((name, kind, time.perf_counter() - t, seen)); kinds[kind].update(seen)
        if sys.stderr.isatty(): print('\r\x1b[K', end='', file=sys.stderr)
        t = time.perf_counter()
        report.publish(exp.scores(), Path(d)/'run', exp.label, exp.provenance())
        publish = time.perf_counter() - t
    total = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20      # Linux counts in KiB
    rate = time_products({bucket(s) for seen in kinds.values() for s in seen})

    print(
        f'{exp.label}; {exp.profile.machine.threads} thread(s) on {exp.profile.machine.device}, {os.cpu_count()} CPUs'
    )
    head = f'{"stage":<34}{"number":>7}{"seconds":>9}{"share":>8}{"GFLOP":>9}{"arithmetic s":>14}{"of the stage":>14}'
    print(head + '\n' + '-'*len(head))

    def line(what: str, n: int, seconds: float, seen: Counter | None = None):
        text = f'{what:<34}{n:>7}{seconds:>9.1f}{seconds/total:>8.1%}'
        if seen:
            text += f'{flops(seen)/1e9:>9.1f}{arithmetic(seen, rate):>14.2f}{arithmetic(seen, rate)/seconds:>14.1%}'
        print(text)
    if each:
        for name, _, seconds, seen in stages: line(name, 1, seconds, seen)
        print('-'*len(head))
    line('imports', 1, imports)
    for kind, seen in kinds.items():
        line(kind, sum(s[1] == kind for s in stages), sum(s[2] for s in stages if s[1] == kind), seen)
    for task in exp.profile.eval.num_fewshot:
        of = [s for s in stages if s[1] == 'eval' and s[0].endswith('/' + task)]
        line(f'  of eval: {task}', len(of), sum(s[2] for s in of), sum((s[3] for s in of), Counter()))
    line('tables, figures, report', 1, publish)
    print('-'*len(head))
    line('total', len(stages), total, sum(kinds.values(), Counter()))
    print(f'peak memory {peak:.2f} GiB')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='Where the time of `make tables` goes.')
    p.add_argument('--profile', default='tiny', help='name of a profile or path of a TOML file')
    p.add_argument('--seed', type=int, help="in place of the profile's seed")
    p.add_argument('--stages', action='store_true', help='a line for every stage, too')
    a = p.parse_args()
    measure(a.profile, a.seed, a.stages)
