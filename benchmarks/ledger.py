"""The contamination ledger at the paper's size: 300K training rows against 28K test items, in one process.

    python benchmarks/ledger.py [--rows 300000] [--items 28000] [--words 150] [--out NAME]

Rows and items are made of random words, drawn as English draws them (Zipf); one row in a thousand holds an item whole, and the ledger has to find exactly those.
Prints seconds, rows a second and the largest memory of the process. The promise is 5 minutes and 4 GiB on two cores.
"""
import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from solar_repro.lab.ledger import NS, find_pairs, make_index


def texts(n: int, length: int, vocabulary: np.ndarray, rng: np.random.Generator):
    ranks = np.arange(1, len(vocabulary) + 1)
    p = 1/ranks; p /= p.sum(); edges = np.cumsum(p)
    for first in range(0, n, 4096):
        sizes = rng.integers(length//2, length*3//2, min(4096, n - first))
        words = vocabulary[np.minimum(np.searchsorted(edges, rng.random(sizes.sum())), len(vocabulary) - 1)]
        for part in np.split(words, np.cumsum(sizes)[:-1]): yield ' '.join(part)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, n in (('rows', 300_000), ('items', 28_000), ('words', 150)): p.add_argument(f'--{flag}', type=int, default=n)
    p.add_argument('--out')
    a = p.parse_args()
    rng = np.random.default_rng(0)
    vocabulary = np.array([f'w{i:x}' for i in range(60_000)])
    items = list(texts(a.items, 60, vocabulary, rng))
    planted = {r: int(rng.integers(a.items)) for r in range(0, a.rows, 1000)}
    rows = (f'{t} {items[planted[i]]}' if i in planted else t for i, t in enumerate(texts(a.rows, a.words, vocabulary, rng)))
    began = time.perf_counter()
    index = make_index(items)
    middle = time.perf_counter()
    found = find_pairs(index, rows)
    end = time.perf_counter()
    missed = [r for r, i in planted.items() if [i, r] not in found[13].tolist()] if len(planted) < 50 else sorted(set((i, r) for r, i in planted.items()) - set(map(tuple, found[13].tolist())))
    out = dict(rows=a.rows, items=a.items, words_a_row=a.words, n=list(NS), index_s=round(middle - began, 1), search_s=round(end - middle, 1),
               rows_a_second=round(a.rows/(end - middle)), peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, 2),
               planted=len(planted), missed=len(missed), pairs={str(n): len(x) for n, x in found.items()})
    print(json.dumps(out, indent=1))
    if a.out:
        path = Path(__file__).resolve().parent/'results'/f'{a.out}.json'
        path.parent.mkdir(exist_ok=True); path.write_text(json.dumps(out, indent=1) + '\n')
    return int(bool(missed) or end - began > 300 or out['peak_gib'] > 4)


if __name__ == '__main__': raise SystemExit(main())
