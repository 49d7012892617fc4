"""Stages side by side: one after another in a process, by two workers of this machine, by two that Ray places, in turn,
each in a process of its own on an empty store; and what the scheduler would take at the paper's scale on 1 to 8 cards.

    python benchmarks/workers.py [--profile smoke] [--repeats 3]

Every time is that of `Experiment.run` alone, loading of libraries included: what a user waits for after set-up. Ways
take turns, so that what else the machine does falls on all of them; the table shows medians. A worker is idle while no
stage is in work in its slot, from the first stage after the data until the longest path of stages, by their measured
times, has ended. All stores are compared: every stage has the same content, whoever built it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from solar_repro.core.config import load_profile
from solar_repro.pipeline.executor import remaining_path
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.graph import build_graph
from solar_repro.pipeline.plan import by_workers, make_plan
from solar_repro.pipeline.progress import Progress

WAYS = {'inline': dict(workers=1), '2 workers': dict(workers=2), '2 workers, Ray': dict(workers=2, ray='local')}
QUIET = dict(OMP_NUM_THREADS='1', GOMP_SPINCOUNT='30000', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
             MPLBACKEND='Agg', PYTHONWARNINGS='ignore')
ROOT = Path(__file__).resolve().parents[1]
AIMS = dict(faster=1.7, idle=.15, ray_s=20., hours=14., bound=.85)


def side(profile: str, way: str, store: str) -> dict:
    "Build a profile's stages in one way: seconds, what each slot did when, contents."
    follow, events = Progress.follow, []

    def noted(self, e):
        if e.kind != 'step': events.append((time.perf_counter() - began, e.slot, e.name, e.kind))
        follow(self, e)
    Progress.follow = noted
    exp, began = Experiment(profile, store=store), time.perf_counter()
    exp.build_with(**WAYS[way])
    exp.run()
    seconds = time.perf_counter() - began
    return dict(seconds=seconds, events=events, contents={n: exp.find(n).content for n in exp.graph})


def run(profile: str, way: str) -> dict:
    with TemporaryDirectory() as d:
        words = [sys.executable, __file__, '--profile', profile, '--side', way, '--store', f'{d}/store']
        env = dict(os.environ, **QUIET, PYTHONPATH=str(ROOT), SOLAR_PROGRESS=os.devnull)
        said = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def idle(graph: dict, events: list, n: int) -> float:
    "Share of the time of `n` workers in which they had no stage, until the longest path has ended."
    began, spans = {}, {}                                # stage -> when and where it was last begun; and its time
    for t, slot, name, kind in events:
        if kind == 'start': began[name] = t
        elif kind == 'done': spans[name] = began[name], t
    spans = {s: x for s, x in spans.items() if graph[s].kind not in ('base', 'data', 'bench')}
    inputs = {s: [i for i in graph[s].inputs.values() if i in spans] for s in graph if s in spans}
    left, path = remaining_path(inputs, {s: b - a for s, (a, b) in spans.items()}), []
    while ready := [s for s in inputs if (path[-1] in inputs[s] if path else not inputs[s])]:
        path.append(max(ready, key=left.get))
    first, last = min(a for a, _ in spans.values()), spans[path[-1]][1]
    busy = sum(max(0., min(b, last) - a) for a, b in spans.values())
    return 1 - busy/(n*(last - first))


def cards() -> list[dict]:
    "What the paper's scale takes from begin to end on 1 to 8 cards, by the scheduler on a clock."
    p = load_profile('a100-bf16')                       # the one to take where a card has 80 GB
    graph = build_graph(p)
    return by_workers(make_plan(p, graph, lambda name: None), graph).to_dict('records')


def measure(profile: str, repeats: int) -> dict:
    graph = build_graph(load_profile(profile))
    ways = [w for w in WAYS if 'ray' not in WAYS[w] or find_spec('ray')]
    seen = {w: [] for w in ways}
    for k in range(repeats):
        for w in ways[k % len(ways):] + ways[:k % len(ways)]:
            seen[w].append(run(profile, w))
            print(f'{w}: {seen[w][-1]["seconds"]:.1f} s', file=sys.stderr, flush=True)
    contents = [r['contents'] for rs in seen.values() for r in rs]
    rows = [dict(way=w, seconds=median(r['seconds'] for r in rs), all_s=[round(r['seconds'], 1) for r in rs],
                 idle=median(idle(graph, r['events'], WAYS[w]['workers']) for r in rs)) for w, rs in seen.items()]
    same = all(c == contents[0] for c in contents)
    return dict(profile=profile, stages=len(graph), rows=rows, same=same, cards=cards())


def verdicts(r: dict) -> list[str]:
    "Each aim, and whether it is reached."
    of = {x['way']: x for x in r['rows']}
    inline, two, ray = (of.get(w) for w in WAYS)
    eight = r['cards'][-1]
    said = [(f'two workers {inline["seconds"]/two["seconds"]:.2f} times as fast as inline; aim {AIMS["faster"]}',
             inline['seconds']/two['seconds'] >= AIMS['faster']),
            (f'two workers idle {two["idle"]:.0%} of the time; aim under {AIMS["idle"]:.0%}',
             two['idle'] < AIMS['idle'])]
    if ray: said.append((f'Ray {ray["seconds"] - two["seconds"]:+.1f} s beside workers of this machine; aim at most '
                         f'{AIMS["ray_s"]:.0f} s', ray['seconds'] - two['seconds'] <= AIMS['ray_s']))
    said += [(f'the paper\'s scale on {eight["workers"]} cards: {eight["hours"]:.1f} h; aim {AIMS["hours"]:.0f} h',
              eight['hours'] <= AIMS['hours']),
             (f'that is {eight["bound"]:.2f} of its bound; aim {AIMS["bound"]}', eight['bound'] >= AIMS['bound']),
             ('every stage has the same content, whoever built it', r['same'])]
    return [f'- {text}: {"reached" if ok else "not reached"}' for text, ok in said]


def show(r: dict) -> str:
    lines = [f'{"":<16}{"seconds":>9}{"idle":>7}   each']
    lines += [f'{x["way"]:<16}{x["seconds"]:>9.1f}{x["idle"]:>7.0%}   {x["all_s"]}' for x in r['rows']]
    lines += ['', f'{"cards":<16}{"hours":>9}{"busy":>7}{"of bound":>10}']
    lines += [f'{x["workers"]:<16}{x["hours"]:>9.1f}{x["busy"]:>7.0%}{x["bound"]:>10.2f}' for x in r['cards']]
    return '\n'.join(lines)


def page(r: dict, command: str) -> str:
    where = f'{platform.machine()}, {os.cpu_count()} CPU cores'
    return (f'# Stages side by side\n\nProfile {r["profile"]}, {r["stages"]} stages, on {where}, load {r["load"]:.1f} '
            f'before; medians of {len(r["rows"][0]["all_s"])}. The hours of cards are those of a100-bf16, '
            'simulated: the scheduler on a clock, with the plan\'s hours of each stage.\n\n' + '\n'.join(verdicts(r))
            + f'\n\nRepeat: `{command}` (the script overwrites this page).\n\n```\n{show(r)}\n```\n')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='Stages side by side: inline, workers, Ray; and simulated on 1 to 8 cards.')
    p.add_argument('--profile', default='smoke', help='name of a profile')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--side', choices=WAYS, help=argparse.SUPPRESS)
    p.add_argument('--store', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side: print(json.dumps(side(a.profile, a.side, a.store)))
    else:
        load = os.getloadavg()[0]
        r = dict(measure(a.profile, a.repeats), load=load)
        print(show(r), *verdicts(r), sep='\n')
        command = ' '.join(['python', 'benchmarks/workers.py', *sys.argv[1:]])
        (ROOT/'benchmarks'/'results'/'workers.md').write_text(page(r, command))
