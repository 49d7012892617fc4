"""Stages side by side: results do not depend on who built what, and nothing that happens to a worker or to its
driver is lost."""

import itertools
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import drivers
import pytest
import waiting
from common import alive, ROOT
from forked import Forked

from solar_repro.core.store import Store
from solar_repro.execution import ray as by_ray
from solar_repro.pipeline import experiment
from solar_repro.execution.executor import execute
from solar_repro.pipeline.experiment import Experiment
from solar_repro.stages.graph import MODELS, Stage
from solar_repro.planning.plan import make_plan
from solar_repro.pipeline.progress import planned_costs, Progress
from solar_repro.publishing.text import write_tables
from solar_repro.reports.cli import main
from solar_repro.tiny.base import shipped_base

WANTED = ['DPO v1', 'SFT v4', 'eval/DPO v1/arc', 'eval/SFT v4/arc']
RUN = f'''
import sys
from solar_repro.pipeline import experiment
store, ray, worker = sys.argv[1:]
if worker: experiment.WORKER = '-c', worker
exp = experiment.Experiment('smoke', store=store)
exp.build_with(2, ray or None)
exp.run({WANTED}, in_workers=True)          # by a worker, even where there is memory for only one
'''
# a worker that stays, the first time, where SFT v3 is past its first checkpoint, and leaves its number beside the
# store; the next one that trains SFT v3 leaves there the first step that it takes
HELD = '''
import os, sys, time
from pathlib import Path
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.serve import make_builder
from solar_repro.execution.workers import serve

def make(hello):
    build, mark = make_builder(hello), Path(hello['store'] + '.held')
    def held(name, step):
        def stays(done, total):
            step(done, total)
            if name != 'SFT v3': return
            if mark.exists():
                if not mark.with_suffix('.next').exists(): mark.with_suffix('.next').write_text(str(done))
                return
            if done <= Experiment('smoke').profile.sft.save_steps: return
            mark.with_suffix('.part').write_text(str(os.getpid()))
            mark.with_suffix('.part').rename(mark)
            time.sleep(10**6)
        return build(name, stays)
    return held
serve(make, int(sys.argv[1]))
'''
ray_only = pytest.mark.skipif(find_spec('ray') is None, reason="Ray is not installed: pip install 'solar_repro[ray]'")
ENGINES = [pytest.param('', id='local'), pytest.param('local', id='ray', marks=ray_only)]


# a worker that builds what it is told in a folder of its own, as on a machine that sees another one there
ELSEWHERE = '''
import sys
from solar_repro.pipeline.serve import make_builder
from solar_repro.execution.workers import serve
serve(lambda hello: make_builder(hello | dict(store=hello['store'] + '.other')), int(sys.argv[1]))
'''


def contents(store: Path) -> dict[str, str]:
    return {a.manifest['name']: a.content for a in Store(store).entries()}


def driver(store: Path, ray: str = '', worker: str = '') -> Forked:
    "A run in a process of its own."
    return Forked(RUN, store, ray, worker)


def held(store: Path, run: Forked) -> int:
    "The worker that stays at a step, as soon as it does."
    mark = Path(f'{store}.held')
    wait_for(mark.exists, run)
    return int(mark.read_text())


def below(pid: int) -> set[int]:
    "All processes that a process has started, and those that they have."
    parents = {}
    for p in Path('/proc').iterdir():
        try: parents[int(p.name)] = int((p/'stat').read_text().rsplit(')', 1)[1].split()[1])
        except (ValueError, OSError): continue         # no process, or one that has just ended
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found: found |= more
    return found - {pid}


def wait_for(what, of: Forked | None = None):
    "Until something is so; a driver that has ended meanwhile is an error, unless Ray cannot be had here."
    try: return waiting.wait_for(what, of)
    except AssertionError:
        if of is None or 'no cluster could be started here' not in of.err: raise
        pytest.skip(f'Ray does not start: {of.err.splitlines()[-1]}')


def test_what_a_worker_built_elsewhere_is_not_taken_for_built(tmp_path, monkeypatch):
    "What it built lay in a folder that this machine does not see, and the next stage failed for want of a key."
    monkeypatch.setattr(experiment, 'WORKER', ('-c', ELSEWHERE))
    exp = Experiment('smoke', store=tmp_path/'store')
    with pytest.raises(OSError, match='data/openorca was built.*not hold it here.*lookupcache=positive.*Run again'):
        exp.run(['data/openorca'], in_workers=True)
    assert contents(tmp_path/'store') == {} and list(contents(tmp_path/'store.other')) == ['data/openorca']


def test_what_failed_is_said_before_what_is_lost(tmp_path, monkeypatch):
    "A stage that is gone again is the lesser news; and what is there with another content is not what was built."
    exp, made = Experiment('smoke', store=tmp_path/'store'), Experiment.make
    def odd(self, name, step):
        if name != 'data/openorca': raise OSError(28, 'no space')
        return made(self, name, step) and 'another'
    monkeypatch.setattr(Experiment, 'make', odd)
    with pytest.raises(OSError, match='no space') as e: exp.run(['data/alpaca_gpt4', 'data/openorca'])
    assert any('Run again to go on' in n for n in e.value.__notes__)
    exp = Experiment('smoke', store=tmp_path/'other')
    with pytest.raises(OSError, match='data/openorca was built.*Run again to go on'): exp.run(['data/openorca'])


@pytest.mark.slow                       # that of a killed worker sees the same of a few stages
@pytest.mark.parametrize('workers', [2, 4])
def test_workers_build_what_one_process_builds(workers, full, tmp_path):
    "All of it, and the tables as written."
    exp, one = Experiment('smoke', store=tmp_path/'store'), Experiment('smoke', store=full)
    exp.build_with(workers)
    exp.run()
    assert contents(tmp_path/'store') == contents(full)
    ours, its = (write_tables(e.scores(), tmp_path/name, e.label, e.custom, e.samples())
                 for name, e in (('ours', exp), ('its', one)))
    assert ours and {f.name: f.read_bytes() for f in ours} == {f.name: f.read_bytes() for f in its}


# a cluster that somebody else has started, until its input ends
CLUSTER = """
import ray, sys
ray.init('local', num_cpus=2, include_dashboard=False, object_store_memory=2**27, logging_level='ERROR')
print('at', ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster(monkeypatch):
    "The address of a Ray cluster of this machine, whose token is in the environment of whoever joins."
    monkeypatch.setenv('RAY_AUTH_MODE', 'token')
    monkeypatch.setenv('RAY_AUTH_TOKEN', '0123456789abcdef'*2)
    env = dict(os.environ, RAY_USAGE_STATS_ENABLED='0')
    p = subprocess.Popen([sys.executable, '-c', CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env=env)
    said = p.stdout.readline()
    if not said.startswith('at '): pytest.skip(f'Ray does not start: {p.communicate()[1].splitlines()[-1:]}')
    yield said.split()[1]
    p.communicate()


@ray_only
@pytest.mark.slow
@pytest.mark.parametrize('joined', [False, True], ids=['own cluster', 'joined'])
def test_stages_built_through_ray_are_those_of_one_process(joined, request, full, tmp_path):
    "Real stages, of a cluster that is started here and of one that was there; a cluster that was there stays."
    address = request.getfixturevalue('cluster') if joined else 'local'
    run = driver(tmp_path/'store', address)
    wait_for(lambda: run.poll() == 0, run)
    want, got = contents(full), contents(tmp_path/'store')
    assert set(got) >= set(Experiment('smoke').needs(WANTED)) and got == {n: want[n] for n in got}
    if joined: assert driver(tmp_path/'store', address).wait() == 0


@pytest.mark.parametrize('ray', ENGINES)
def test_a_killed_worker_costs_only_what_it_did_since_its_checkpoint(ray, full, tmp_path):
    "And what is built is what one process builds, whoever builds it."
    run = driver(tmp_path/'store', ray, HELD)
    os.kill(held(tmp_path/'store', run), signal.SIGKILL)
    assert run.wait() == 0, run.err
    assert int((tmp_path/'store.next').read_text()) > Experiment('smoke').profile.sft.save_steps
    want, got = contents(full), contents(tmp_path/'store')
    assert set(got) >= set(Experiment('smoke').needs(WANTED)) and got == {n: want[n] for n in got}


@pytest.mark.parametrize('ray', ENGINES)
@pytest.mark.parametrize('end', [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_driver_that_ends_leaves_no_worker(end, ray, tmp_path):
    run = driver(tmp_path/'store', ray, HELD)
    worker = held(tmp_path/'store', run)
    pids = below(run.pid)
    assert worker in pids
    run.send_signal(end)
    run.wait()
    wait_for(lambda: not any(map(alive, pids)))
    if end == signal.SIGINT: assert 'stages are finished and kept' in run.err


def test_an_engine_that_is_not_there_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(by_ray, 'ray', None)
    run = ['run', '--profile', 'smoke', '--store', str(tmp_path/'store')]
    for words, said in ((['--engine', 'ray'], "Run: pip install 'solar_repro[ray]'"),
                        (['--address', 'auto'], 'expected it with --engine ray only')):
        assert main([*run, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path/'store').exists()


@pytest.mark.parametrize('words,engine', [
    ([], ('auto', 2)), (['--engine', 'local'], (None, 2)), (['--engine', 'ray'], ('auto', 2)),
    (['--engine', 'inline'], (None, 1))])
def test_the_engine_that_is_named_holds_and_not_the_profiles(words, engine, tmp_path, monkeypatch):
    "--engine local could not turn off the profile's Ray, and --engine ray left its cluster for one of this machine."
    (tmp_path/'mine.toml').write_text('extends = "smoke"\n[machine]\nray = "auto"\nworkers = 2\n')
    with_engine = []
    monkeypatch.setattr(Experiment, 'run', lambda self: with_engine.append(self.profile.machine))
    monkeypatch.setattr('solar_repro.pipeline.experiment.ray_engine', lambda: None)
    monkeypatch.setattr('solar_repro.reports.published.published', lambda exp: [])
    assert main(['run', '--profile', str(tmp_path/'mine.toml'), '--store', str(tmp_path/'store'), *words]) == 0
    assert [(m.ray, m.workers) for m in with_engine] == [engine]


# workers that need no library: one dies at each stage; one stays in it, and leaves its number beside the store
DIES = '''
import os, signal, sys
from solar_repro.execution.workers import serve
serve(lambda hello: lambda name, step: os.kill(os.getpid(), signal.SIGKILL), int(sys.argv[1]))
'''
STAYS = '''
import os, sys, time
from pathlib import Path
from solar_repro.execution.workers import serve
def make(hello):
    def stays(name, step):
        Path(f"{hello['store']}.{os.getpid()}.stays").touch()
        time.sleep(10**6)
    return stays
serve(make, int(sys.argv[1]))
'''


@pytest.fixture
def words(tmp_path):
    "Of a command that builds side by side."
    return ['run', '--workers', '2', '--profile', 'smoke', '--store', str(tmp_path/'store')]


def test_a_worker_that_dies_three_times_is_told_in_words_with_what_is_missing_and_how_to_go_on(
        words, monkeypatch, capsys):
    "It came as a traceback, and was called a fault of ours."
    monkeypatch.setattr(experiment, 'WORKER', ('-c', DIES))
    assert main(words) == 2
    err = capsys.readouterr().err
    said = err[err.index('solar-repro: the worker'):]
    assert 'that built SFT v3 was killed (SIGKILL)' in said and 'Tried 3 times. Where memory is short' in said
    short = said.partition('Rows without all scores: ')[2].partition('. What is built is kept.')[0]
    assert set(short.split(', ')) == {'base', *MODELS} and 'Traceback' not in said
    program, *again = shlex.split(said.splitlines()[-1].removeprefix('Go on with: '))
    assert (program, again) == ('solar-repro', words)


def test_ctrl_c_ends_two_workers_and_is_one_line(words, tmp_path):
    code = f'import psutil, sys\nfrom types import SimpleNamespace\nfrom solar_repro.pipeline import experiment\n' \
           'psutil.virtual_memory = lambda: SimpleNamespace(available=2**36)       # room for two\n' \
           f'experiment.WORKER = "-c", {STAYS!r}\n' \
           'from solar_repro.reports.cli import main\nsys.exit(main(sys.argv[1:]))'
    run = Forked(code, *words)
    wait_for(lambda: len(list(tmp_path.glob('*.stays'))) == 2, run)
    workers = {int(p.name.split('.')[1]) for p in tmp_path.glob('*.stays')}
    assert workers <= below(run.pid)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert not any(map(alive, workers))
    building, *stages, said = filter(None, run.err.splitlines())
    assert 'missing of profile smoke' in building and stages and all(x.startswith('stage ') for x in stages)
    assert said.startswith('interrupted in SFT') and said.endswith('stages are finished and kept. Run again to go on.')


@pytest.mark.parametrize('where', ['pipeline.builder.check_before_training', 'pipeline.experiment.Experiment._engine'])
def test_ctrl_c_before_the_first_stage_is_one_line_too(where, words, monkeypatch, capsys):
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)     # a terminal, whatever other tests have loaded
    monkeypatch.setattr(f'solar_repro.{where}', interrupted)
    assert main(words) == 130
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith('interrupted; ') and said.endswith('stages are finished and kept. Run again to go on.')


# a worker that leaves beside the store, under the stage's name, the card that it sees
SEES = '''
import os, sys
from pathlib import Path
from solar_repro.execution.workers import serve
def make(hello):
    return lambda name, step: Path(f"{hello['store']}.{name}").write_text(os.environ['CUDA_VISIBLE_DEVICES'])
serve(make, int(sys.argv[1]))
'''


def test_each_worker_sees_a_card_of_its_own_and_stages_cost_what_the_plan_says(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, 'WORKER', ('-c', SEES))
    monkeypatch.setattr('solar_repro.pipeline.builder.visible_cards', lambda: ['2', '5'])
    exp, names, slots = Experiment('a100-bf16', store=tmp_path/'store'), ['SFT v1', 'SFT v2', 'SFT v3', 'SFT v4'], {}
    apart = dict.fromkeys(names, ())
    costs = dict.fromkeys(names, 100.)
    engine = exp._engine(apart, costs, 0, print, False)
    execute(apart, engine, costs, on_event=lambda e: slots.update({e.name: e.slot}))
    engine.stop()
    assert {n: Path(f'{tmp_path}/store.{n}').read_text() for n in names} == {n: ['2', '5'][slots[n]] for n in names}
    assert set(slots.values()) == {0, 1}
    base = dict(base=SimpleNamespace(path=shipped_base())).get     # as if it were there
    hours = make_plan(exp.profile, exp.graph, base).stages.set_index('stage').loc[names, 'hours']
    assert planned_costs(exp.profile, exp.graph, base, names)[0] == pytest.approx((hours*1200).to_dict())


def test_how_far_a_run_is_goes_by_the_costs_by_which_stages_are_ordered(tmp_path, monkeypatch):
    "It went by the tiny world's, for which four trainings are alike and a benchmark costs a minute."
    seen, run = [], experiment.execute
    monkeypatch.setattr(experiment, 'planned_costs', lambda p, graph, find, names: (
        dict(zip(names, itertools.count(1.))), 0))
    monkeypatch.setattr(experiment, 'Progress', lambda *a: seen.append(a[1]) or Progress(*a))
    def noted(inputs, engine, costs, *rest, **how):
        seen.append(costs)
        return run(inputs, engine, costs, *rest, **how)
    monkeypatch.setattr(experiment, 'execute', noted)
    Experiment('smoke', store=tmp_path).run(['data/openorca', 'data/alpaca_gpt4'])
    assert seen[0] is seen[1] and list(seen[0].values()) == [1., 2.]


@pytest.mark.slow
def test_a_second_driver_takes_other_stages(full, tmp_path):
    "Two workers each; test_run has the same of two processes without workers."
    names = [*WANTED, 'SFT v1', 'SFT v2']
    ps, (one, other) = drivers.two(tmp_path/'store', 2, names, hold='SFT')
    assert one and other and sorted(one + other) == sorted(Experiment('smoke').needs(names))
    told = [line.partition(': ')[2].partition(',')[0] for line in ps[1].err.splitlines() if ', step ' not in line]
    assert told.count('SFT v3') == 1                # though it was asked for every second
    assert ps[1].err.count('SFT v3 is being built by another run') <= 1
    want, got = contents(full), contents(tmp_path/'store')
    assert got == {n: want[n] for n in got}


def test_a_failed_stage_stops_only_what_needs_it(tmp_path, monkeypatch):
    exp = Experiment('smoke', store=tmp_path)
    build = exp.builder.build

    def fails(s, *rest, **how):
        if s.name == 'SFT v4': raise RuntimeError('no luck')
        return build(s, *rest, **how)
    monkeypatch.setattr(exp.builder, 'build', fails)
    with pytest.raises(RuntimeError, match='no luck') as e: exp.run(['eval/SFT v4/arc', 'SFT v1'])
    assert exp.find('SFT v1') and exp.find('SFT v4') is None
    said = ' '.join(e.value.__notes__)
    assert 'SFT v4 failed, 1 need them' in said and 'Rows without all scores: SFT v4' in said
    assert said.endswith('What is built is kept. Run again to go on.')


def test_the_command_that_goes_on_after_a_failure_is_the_one_that_failed(tmp_path, monkeypatch, capsys):
    (tmp_path/'my own.toml').write_text('extends = "smoke"\n[machine]\nworkers = 1\n')
    def fails(*_, **how): raise OSError('no luck')
    monkeypatch.setattr('solar_repro.pipeline.builder.Builder.build', fails)
    words = ['run', '--profile', str(tmp_path/'my own.toml'), '--seed', '3', '--store', str(tmp_path/'store')]
    assert main(words) == 2
    *_, last = capsys.readouterr().err.splitlines()
    program, *again = shlex.split(last.removeprefix('Go on with: '))
    assert program == 'solar-repro' and again == words


def test_a_full_store_is_put_on_the_clock_with_the_times_that_were_measured(full, capsys):
    "It said 0 min, and a longest path of nothing."
    words = ['plan', '--profile', 'smoke', '--store', str(full), '--workers', '2']
    assert main([*words, '--actual', '--json']) == 0
    told = json.loads(capsys.readouterr().out)
    hours = sum(s['measured_hours'] for s in told['stages'])
    assert hours/2 <= told['workers']['hours']*(1 + 1e-9) < hours  # JSON keeps 15 places: two halves may be 1e-14 over
    assert main([*words, '--actual']) == 0
    said = capsys.readouterr().out
    assert 'Longest path: ' in said and ' -> SFT v' in said and 'From first start to last end it took' in said
    assert main(words) == 0
    assert 'Nothing is left to build.' in capsys.readouterr().out


def test_the_benchmark_counts_the_start_of_a_worker_as_idle(monkeypatch):
    "Two workers load libraries for 2 and 3 s; then one trains 4 s and scores 2 s, and the other trains 4 s."
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    idle = runpy.run_path(ROOT/'benchmarks'/'workers.py')['idle']
    graph = dict(data=Stage('data', 'data', {}, {}), a=Stage('a', 'sft', {}, dict(data='data')),
                 b=Stage('b', 'sft', {}, dict(data='data')), c=Stage('c', 'eval', {}, dict(model='a')))
    events = [(0, 0, 'data', 'start'), (1, 0, 'data', 'done'), (2, 0, 'a', 'start'), (2, 1, 'b', 'start'),
              (4, 0, 'a', 'step'), (5, 1, 'b', 'step'), (8, 0, 'a', 'done'), (8, 0, 'c', 'start'), (9, 1, 'b', 'done'),
              (10, 0, 'c', 'done')]
    assert idle(graph, events, 2) == 1 - (4 + 4 + 2)/(2*8)
