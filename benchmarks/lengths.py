"""How long the rows of a training set are: the `lengths` of `data.SETS`, counted again.

Rows are JSON lines with the published set's columns, or with prompt and completion, or prompt, chosen and rejected.
Run: python benchmarks/lengths.py alpaca_gpt4 rows.jsonl tokenizer.json
     python benchmarks/lengths.py openorca rows.jsonl tokenizer.json --row-bytes 1690     a sample that leans, weighted
     to this mean
"""

import argparse
import json
from pathlib import Path

import numpy as np

from solar_repro.data import from_alpaca, from_metamath, from_openorca, from_ultrafeedback
from solar_repro.planning.cost_model import count_rows, counter
from solar_repro.core.config import load_profile

READ = dict(
    alpaca_gpt4=from_alpaca,
    openorca=from_openorca,
    synth_math_instruct=from_metamath,
    ultrafeedback_clean=from_ultrafeedback,
)


def weights_to(mean, sizes):
    "Weights exp(-k size) under which the sizes have this mean."
    x, low, high = np.array(sizes, float), -1e-2, 1e-2
    if not x.min() < mean < x.max():
        raise SystemExit(
            f'--row-bytes {mean:g}: expected a size between {x.min():g} and {x.max():g}, the smallest and largest row.'
        )
    for _ in range(200):
        k = (low + high)/2
        w = np.exp(-k*(x - x.mean())); w /= w.sum()
        low, high = (k, high) if (w*x).sum() > mean else (low, k)
    return w


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('set', choices=READ)
    a.add_argument('rows', type=Path)
    a.add_argument('tokenizer', type=Path)
    a.add_argument('--row-bytes', type=float)
    a = a.parse_args()
    rows = [json.loads(l) for l in a.rows.read_text(encoding='utf-8').split('\n') if l.strip()]
    rows = [
        r if {'prompt', 'completion'} <= set(r) or isinstance(r.get('chosen'), str) else READ[a.set](r) for r in rows
    ]
    count = counter(a.tokenizer.parent, load_profile('a100'))
    each = [count_rows([r], count, '') for r in rows]
    tokens, longest = np.array([x.mean for x in each]), np.array([x.quantiles[-1] for x in each])
    sizes = [len(''.join(r.values()).encode()) for r in rows]
    w = weights_to(a.row_bytes, sizes) if a.row_bytes else np.full(len(rows), 1/len(rows))
    mean = (w*tokens).sum()
    order = np.argsort(longest)
    q = np.interp(np.linspace(0, 1, 21), np.cumsum(w[order]), longest[order])
    print(
        f"n = {1/(w**2).sum():.0f}, mean = {mean:.1f}, sd = {(w*(tokens - mean)**2).sum()**.5:.1f}, quantiles ="
        f" {tuple(q.astype(int).tolist())}, bytes = {(w*sizes).sum():.0f} a row"
    )


if __name__ == '__main__': main()
