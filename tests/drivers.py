"""Runs on one store, each in a process of its own, that note what they build and stop where a test wants them to.

NOTED goes before other code. A run, or its workers, appends the name of each stage that it builds itself, not those
that it finds or leaves to others, to the file that BUILT names. In stages whose names begin with HOLD, if that
is not empty, it stays until the file at BUILT with `.go` is there.
"""
from pathlib import Path

from forked import Forked
from waiting import wait_for

NOTED = '''
import os, time
from pathlib import Path
from solar_repro.core.store import Store
whole, built, hold = Store.build, os.environ['BUILT'], os.environ['HOLD']
def noted(self, kind, key, fn, **how):
    def writes(out):
        with open(built, 'a') as f: f.write(how['name'] + '\\n')
        while hold and how['name'].startswith(hold) and not Path(built + '.go').exists(): time.sleep(.05)
        fn(out)
    return whole(self, kind, key, writes, **how)
Store.build = noted
'''
WORKER = NOTED + '''
import sys
from solar_repro.pipeline.serve import make_builder
from solar_repro.execution.workers import serve
serve(make_builder, int(sys.argv[1]))
'''
RUN = NOTED + f'''
import sys
from solar_repro.pipeline import experiment
experiment.WORKER = '-c', {WORKER!r}
store, workers, *names = sys.argv[1:]
exp = experiment.Experiment('smoke', store=store)
exp.build_with(int(workers))
exp.run(names)
'''


def start(store: Path, name: str, workers: int, names: list[str], hold: str = '') -> Forked:
    "A run called `name`; see `built`."
    return Forked(RUN, store, workers, *names, env=dict(BUILT=f'{store}.{name}', HOLD=hold))


def built(store: Path, name: str) -> list[str]:
    "What a run has built so far, the stage in work included."
    file = Path(f'{store}.{name}')
    return file.read_text().splitlines() if file.exists() else []


def two(store: Path, workers: int, names: list[str], hold: str) -> tuple[list[Forked], list[list[str]]]:
    """Two runs that want the same: one stays in stages of a name until the other builds something, too.

    Returns both, ended, and what each has built.
    """
    one = start(store, 'one', workers, names, hold)
    wait_for(lambda: any(n.startswith(hold) for n in built(store, 'one')), one)
    other = start(store, 'other', workers, names)
    wait_for(lambda: built(store, 'other') or 'waiting for it.' in other.err, other)
    Path(f'{store}.one.go').touch()
    for p in (one, other): assert p.wait() == 0, p.err
    return [one, other], [built(store, name) for name in ('one', 'other')]
