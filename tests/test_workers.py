"""Stages side by side: results do not depend on who built what, and nothing that happens to a worker or to its
driver is lost."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from forked import Forked

from solar_repro.core.config import load_profile
from solar_repro.core.store import Store
from solar_repro.pipeline.experiment import Experiment

WANTED = ['DPO v1', 'SFT v4', 'eval/DPO v1/arc', 'eval/SFT v4/arc']
RUN = f'''
import sys
from solar_repro.core.config import load_profile
from solar_repro.pipeline.experiment import Experiment
p = load_profile('smoke')
p = p.model_copy(update=dict(machine=p.machine.model_copy(update=dict(workers=2))))
Experiment(p, store=sys.argv[1]).run({WANTED})
'''


def two_workers():
    p = load_profile('smoke')
    return p.model_copy(update=dict(machine=p.machine.model_copy(update=dict(workers=2))))


def contents(store: Path) -> dict[str, str]:
    return {a.manifest['name']: a.content for a in Store(store).entries()}


def driver(store: Path, progress: Path) -> Forked:
    "A run in a process of its own, which says in a file how far it is."
    return Forked(RUN, store, env=dict(SOLAR_PROGRESS=str(progress)))


def workers_of(pid: int) -> list[int]:
    "Processes that serve a driver."
    found = []
    for p in Path('/proc').iterdir():
        if not p.name.isdigit(): continue
        try:
            serves = b'solar_repro.pipeline.serve' in (p/'cmdline').read_bytes()
            if serves and int((p/'stat').read_text().rsplit(')', 1)[1].split()[1]) == pid: found.append(int(p.name))
        except (FileNotFoundError, ProcessLookupError): continue
    return found


def alive(pid: int) -> bool:
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False


def wait_for(what, of: Forked | None = None):
    "Until something is so; a driver that has ended meanwhile is an error."
    while not (got := what()):
        assert of is None or of.poll() is None, of.err
        time.sleep(.05)
    return got


def steps_of(progress: Path, name: str):
    "Reports of a stage that is under way."
    lines = progress.read_text().splitlines() if progress.exists() else []
    return [p for p in map(json.loads, lines) if p['name'] == name and p['total']]


def test_two_workers_build_what_one_process_builds(full, tmp_path, capfd):
    exp = Experiment(two_workers(), store=tmp_path)
    exp.run(WANTED)
    want = contents(full)
    got = contents(tmp_path)
    assert set(got) == set(exp.needs(WANTED)) and got == {n: want[n] for n in got}


def test_a_killed_worker_costs_only_what_it_did_since_its_checkpoint(full, tmp_path):
    run = driver(tmp_path/'store', tmp_path/'progress')
    wait_for(lambda: steps_of(tmp_path/'progress', 'SFT v3'), run)
    for pid in workers_of(run.pid): os.kill(pid, signal.SIGKILL)
    assert run.wait() == 0, run.err
    want = contents(full)
    assert all(want[n] == c for n, c in contents(tmp_path/'store').items())


@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_leaves_no_worker(end, tmp_path):
    run = driver(tmp_path/'store', tmp_path/'progress')
    wait_for(lambda: steps_of(tmp_path/'progress', 'SFT v3'), run)
    pids = workers_of(run.pid)
    assert pids
    run.send_signal(end)
    run.wait()
    wait_for(lambda: not any(map(alive, pids)))
    if end == signal.SIGINT: assert 'stages are finished and kept' in run.err


def test_a_second_driver_takes_other_stages(full, tmp_path):
    runs = [driver(tmp_path/'store', tmp_path/f'progress{k}') for k in range(2)]
    assert [r.wait() for r in runs] == [0, 0], [r.err for r in runs]
    want = contents(full)
    assert {n: c for n, c in contents(tmp_path / 'store').items()} == {
        n: want[n] for n in Experiment('smoke').needs(WANTED)
    }


def test_a_failed_stage_stops_only_what_needs_it(tmp_path, monkeypatch):
    exp = Experiment('smoke', store=tmp_path)
    build = exp.builder.build

    def fails(s, *rest):
        if s.name == 'SFT v4': raise RuntimeError('no luck')
        return build(s, *rest)
    monkeypatch.setattr(exp.builder, 'build', fails)
    with pytest.raises(RuntimeError, match='no luck') as e: exp.run(['eval/SFT v4/arc', 'SFT v1'])
    assert exp.find('SFT v1') and exp.find('SFT v4') is None
    said = ' '.join(e.value.__notes__)
    assert 'SFT v4 failed, 1 need them' in said and 'Rows without all scores: SFT v4' in said
    assert 'solar-repro run --profile smoke' in said
