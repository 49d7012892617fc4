"""What it costs that nothing is lost: the share of a run that goes into syncing and hashing.

    python benchmarks/durability.py [--profile smoke] [--pairs 2] [--out NAME]

A pair is two runs of a profile on cold stores, one after the other, each in a process of its own that has loaded the
libraries: as it is, with each call of fsync and of the hash of a file timed, and without either (fsync does nothing, a
file's hash is its inode, size and time). The share is what the timed calls take of their run. The ratio of the two
runs' times says the same from outside, with all else that the machine did; which is first takes turns. --out writes
results/NAME.md. The aim is at most 2 %.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from kept import keep

AIM = .02


def timed(f, spent: Counter):
    def g(*args, **how):
        began = time.perf_counter()
        try: return f(*args, **how)
        finally:
            spent[f.__name__] += time.perf_counter() - began
            spent[f'{f.__name__} calls'] += 1
    return g


def as_it_is(path: Path) -> str:
    s = os.stat(path)
    return f'{s.st_ino} {s.st_size} {s.st_mtime_ns}'


def once(profile: str, safe: bool) -> dict: # seconds: in all, in fsync, in file_hash; calls of both
    "One run in this process."
    from solar_repro.core import files
    spent, real = Counter(), os.fsync
    os.fsync = timed(real, spent) if safe else lambda fd: None
    files.file_hash = timed(files.file_hash, spent) if safe else as_it_is
    from solar_repro.pipeline import builder  # noqa: F401  after the change, which it and others import
    from solar_repro.pipeline.experiment import Experiment
    with TemporaryDirectory(dir=Path.cwd()) as d:
        exp = Experiment(profile, store=Path(d)/'store')
        exp.build_with(1)
        real(os.open(d, os.O_RDONLY))
        began = time.perf_counter()
        exp.run()
        return dict(spent, seconds=time.perf_counter() - began, stages=len(exp.graph))


def apart(profile: str, safe: bool) -> dict:
    words = [sys.executable, __file__, '--profile', profile, '--once', str(int(safe))]
    quiet = dict(os.environ, TQDM_DISABLE='1')
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=quiet)
    return json.loads(done.stdout.splitlines()[-1])


def page(profile: str, pairs: list[tuple[dict, dict]]) -> str:
    share = lambda x: (x['fsync'] + x['file_hash'])/x['seconds']
    shares, ratios, rows = [share(a) for a, _ in pairs], [a['seconds']/b['seconds'] for a, b in pairs], []
    for (a, b), s, r in zip(pairs, shares, ratios):
        inside = ' | '.join(f"{a[x]:.2f} ({a[f'{x} calls']})" for x in ('fsync', 'file_hash'))
        rows.append(f"| {a['seconds']:.1f} | {inside} | {s:.2%} | {b['seconds']:.1f} | {r:.3f} |")
    aim = f'Aim: at most {AIM:.0%}; {"met" if mean(shares) <= AIM else "**not met**"}.'
    return f"""# What syncing and hashing cost in a run of `{profile}`

All {pairs[0][0]['stages']} stages in one process on a cold store; {os.cpu_count()} CPUs, load \
{os.getloadavg()[0]:.1f} at the end. {aim}

| run, s | in fsync, s (calls) | in hashes of files, s (calls) | share | run without both, s | ratio |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The share is {mean(shares):.2%} on average. The runs' ratio, {min(ratios):.3f} to {max(ratios):.3f}, carries what else \
the machine did.

Repeat: `python benchmarks/durability.py --profile {profile} --pairs {len(pairs)}`.
"""


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--profile', default='smoke')
    p.add_argument('--pairs', type=int, default=2)
    p.add_argument('--out', help='name of a page in results/')
    p.add_argument('--once', type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.once is not None:
        print(json.dumps(once(a.profile, bool(a.once))))
        return 0
    pairs = []
    for k in range(a.pairs):
        runs = {safe: apart(a.profile, safe) for safe in (k % 2 == 0, k % 2 == 1)}
        pairs.append((runs[True], runs[False]))
    said = page(a.profile, pairs)
    print(said)
    if a.out: keep(a.out, said)
    return 0


if __name__ == '__main__': sys.exit(main())
