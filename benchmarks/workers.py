"""Stages side by side: one after another in a process, by two workers of this machine, by two that Ray places, in turn,
each in a process of its own on an empty store; and what the scheduler would take at the paper's scale on 1 to 8 cards.

    python benchmarks/workers.py [--profile smoke] [--repeats 3]
    python benchmarks/workers.py --commands [--profile tiny] [--store runs/store]

Every time is that of `Experiment.run` alone, loading of libraries included: what a user waits for after set-up. Ways
take turns, so that what else the machine does falls on all of them; the table shows medians. A worker is idle while no
stage is in work in its slot, from the first stage after the data until the longest path of stages, by their measured
times, has ended; and while it loads its libraries, up to the first step of its first stage. All stores are compared:
every stage has the same content, whoever built it. What it saves that the base stays in memory is seen with two
evaluations, one after the other in one worker, and by two workers that are fresh.

With --commands: what is waited for on a store that is full. Each command is run once before it is timed, which builds
what the store lacks, if anything.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from kept import command, keep

from solar_repro.core.config import load_profile
from solar_repro.execution.executor import execute, remaining_path
from solar_repro.execution.workers import ProcessEngine
from solar_repro.pipeline.experiment import Experiment, WORKER
from solar_repro.pipeline.progress import Progress
from solar_repro.planning.plan import by_workers, make_plan
from solar_repro.stages.graph import build_graph

WAYS = {'inline': dict(workers=1), '2 workers': dict(workers=2), '2 workers, Ray': dict(workers=2, ray='local')}
QUIET = dict(OMP_NUM_THREADS='1', GOMP_SPINCOUNT='30000', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
             MPLBACKEND='Agg', PYTHONWARNINGS='ignore')
ROOT = Path(__file__).resolve().parents[1]
FILES = 'base', 'data', 'bench'                          # kinds of stages that are built before workers are started
AIMS = dict(faster=1.7, idle=.15, ray_s=20., hours=14., bound=.85)
COMMAND_AIMS = {'status': 2., 'run': 5., 'make tables': 10., 'make tables, after a change of a docstring': 60.}  # s


def side(profile: str, way: str, store: str) -> dict:
    "Build a profile's stages in one way: seconds, what each slot did when, contents."
    follow, events, loaded = Progress.follow, [], set()

    def noted(self, e):
        first = e.kind == 'step' and e.slot not in loaded and exp.graph[e.name].kind not in FILES
        if e.kind != 'step' or first: events.append((time.perf_counter() - began, e.slot, e.name, e.kind))
        if first: loaded.add(e.slot)
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
        env = dict(os.environ, **QUIET, PYTHONPATH=str(ROOT), TQDM_DISABLE='1')
        said = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def idle(graph: dict, events: list, n: int) -> float:
    "Share of the time of `n` workers in which they had no stage or were starting, until the longest path has ended."
    began, spans, starts = {}, {}, []                    # stage -> when it was last begun; and its time
    for t, slot, name, kind in events:
        if graph[name].kind in FILES: continue
        if kind == 'start': starts.append(t)
        if kind in ('start', 'step'): began[name] = t    # the first step of a slot: before, its worker loads libraries
        elif kind == 'done': spans[name] = began[name], t
    inputs = {s: [i for i in graph[s].inputs.values() if i in spans] for s in graph if s in spans}
    left, path = remaining_path(inputs, {s: b - a for s, (a, b) in spans.items()}), []
    while ready := [s for s in inputs if (path[-1] in inputs[s] if path else not inputs[s])]:
        path.append(max(ready, key=left.get))
    first, last = min(starts), spans[path[-1]][1]
    busy = sum(max(0., min(b, last) - a) for a, b in spans.values())
    return 1 - busy/(n*(last - first))


def evaluate(profile: str, fresh: bool) -> float:
    "Seconds of two evaluations of the base, one after the other, by one worker or each by a fresh one."
    names = ['eval/base/arc', 'eval/base/winogrande']
    with TemporaryDirectory() as d:
        exp = Experiment(profile, store=f'{d}/store')
        exp.run([i for n in names for i in exp.graph[n].inputs.values()])
        hello = dict(profile=exp.profile.model_dump(mode='json'), store=f'{d}/store')
        began, engine = time.perf_counter(), None
        for name in names:
            if fresh or engine is None:
                if engine: engine.stop()
                engine = ProcessEngine([sys.executable, *WORKER], hello, 1)
            done = execute({name: ()}, engine, {})
            assert list(done.built) == [name], done.failed
        seconds = time.perf_counter() - began
        engine.stop()
    return seconds


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
    stays = {fresh: median(evaluate(profile, fresh) for _ in range(repeats)) for fresh in (False, True)}
    return dict(profile=profile, stages=len(graph), rows=rows, same=same, cards=cards(), stays=stays)


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
    one, two = r['stays'][False], r['stays'][True]
    lines += ['', f'Two evaluations of the base: {one:.1f} s by one worker, {two:.1f} s by two fresh ones, '
                  f'{two/one:.2f} times as long.']
    return '\n'.join(lines)


@contextmanager
def other_docstring():
    "While this holds, one docstring of the library is another."
    file = ROOT/'solar_repro'/'publishing'/'text.py'
    was = file.read_bytes()
    file.write_bytes(was.replace(b'"""', b'"""Changed: ', 1))
    try: yield
    finally: file.write_bytes(was)


def seconds_of(words: list, store: str) -> float:
    began = time.perf_counter()
    env = dict(os.environ, SOLAR_STORE=store, PYTHONPATH=str(ROOT))
    subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def commands(profile: str, store: str) -> dict[str, float]:
    "Seconds of commands that have nothing to build."
    of = [sys.executable, '-m', 'solar_repro']
    ask = {'status': [*of, 'status', '--profile', profile], 'run': [*of, 'run', '--profile', profile],
           'make tables': ['make', 'tables', f'PROFILE={profile}']}
    found = {}
    for name, words in ask.items():
        seconds_of(words, store)
        found[name] = seconds_of(words, store)
    with other_docstring(): found['make tables, after a change of a docstring'] = seconds_of(ask['make tables'], store)
    return found


def page(r: dict, repeat: str) -> str:
    where = f'{platform.machine()}, {os.cpu_count()} CPU cores'
    return (f'# Stages side by side\n\nProfile {r["profile"]}, {r["stages"]} stages, on {where}, load {r["load"]:.1f} '
            f'before; medians of {len(r["rows"][0]["all_s"])}. The hours of cards are those of a100-bf16, '
            'simulated: the scheduler on a clock, with the plan\'s hours of each stage.\n\n' + '\n'.join(verdicts(r))
            + f'\n\nRepeat: `{repeat}` (the script overwrites this page).\n\n```\n{show(r)}\n```\n')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='Stages side by side: inline, workers, Ray; and simulated on 1 to 8 cards.')
    p.add_argument('--profile', default='smoke', help='name of a profile')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--commands', action='store_true', help='time commands on a full store instead')
    p.add_argument('--store', default=str(ROOT/'runs'/'store'), help='that store')
    p.add_argument('--side', choices=WAYS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side: print(json.dumps(side(a.profile, a.side, a.store)))
    elif a.commands:
        for name, s in commands(a.profile, a.store).items():
            print(f'{name:<45}{s:>7.1f} s; aim {COMMAND_AIMS[name]:.0f} s', flush=True)
    else:
        load = os.getloadavg()[0]
        r = dict(measure(a.profile, a.repeats), load=load)
        print(show(r), *verdicts(r), sep='\n')
        keep('workers', page(r, command()))
