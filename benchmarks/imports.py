"""How long a process takes that imports what trains and scores, and ends: as Python does it, and as this package does.

Both ways take turns, each in a process of its own. What the second saves is the search for garbage among what stays.
"""
import argparse
import platform
import statistics
import subprocess
import sys
import time

from kept import keep

WAYS = {'plain': 'import solar_repro.pipeline.builder',
        'ours': 'from solar_repro.pipeline.model import heavy; heavy()'}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - start


def measured(rounds: int) -> dict[str, list[float]]:
    for code in WAYS.values(): seconds(code)                 # what is read from disk is in memory then
    took = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, code in WAYS.items(): took[way].append(seconds(code))
    return took


def page(took: dict[str, list[float]]) -> str:
    ratio = statistics.median(o / p for p, o in zip(took['plain'], took['ours']))
    each = '\n'.join(f'{w:<6} {statistics.median(x):6.2f}   {[round(s, 2) for s in x]}' for w, x in took.items())
    return ('# Imports\n\nA process that imports what trains and scores, and ends; the two ways took turns, on '
            f'{platform.machine()}, Python {platform.python_version()}.\n\n'
            f'- ours takes {ratio:.2f} of the time (median over the rounds)\n\nRepeat: `python benchmarks/imports.py '
            f'--rounds {len(took["plain"])}` (the script overwrites this page).\n\n```\n       median s   each\n'
            f'{each}\n```\n')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--out', default='imports', help='name of a page in results/')
    args = p.parse_args()
    text = page(measured(args.rounds))
    keep(args.out, text)
    print(text)


if __name__ == '__main__': main()
