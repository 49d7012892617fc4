"""The check of a card runs whole at toy size where there is none, and writes what it found after every part."""
import importlib.util
import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from waiting import HOUR, wait_for

CHECK = Path(__file__).resolve().parents[1]/'benchmarks'/'gpu_check.py'
STEPS = ['four_bits', 'recipe', 'sft', 'dpo', 'scoring', 'merging']


def check(out, *words):
    command = [sys.executable, str(CHECK), '--out', str(out), *words]
    said = subprocess.run(command, capture_output=True, text=True)
    return said, json.loads(out.read_text())


def test_a_step_that_has_no_time_left_is_named(tmp_path):
    said, out = check(tmp_path/'x.json', '--minutes', '0')
    assert said.returncode == 0, said.stderr[-2000:]
    assert list(out['steps']) == STEPS
    assert all(x == dict(ok=None, error='no time left') for x in out['steps'].values())


@pytest.fixture
def script():
    "The script as a module."
    spec = importlib.util.spec_from_file_location('gpu_check', CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DIES = """
import json, os, sys, time
open(sys.argv[4], 'w').write(json.dumps(dict(ok=None, nf4_error=.1)))
if sys.argv[2] == 'hangs': time.sleep(10**6)
print('device-side assert', file=sys.stderr, flush=True)
os._exit(3)
"""


class Hanging(subprocess.Popen):
    "A process whose time is over once it has found something, on however slow a machine."
    def wait(self, timeout=None):
        if timeout is None: return super().wait()
        found = Path(self.args[-1])
        wait_for(lambda: found.exists() and found.read_text(), self)
        raise subprocess.TimeoutExpired(self.args, timeout)


@pytest.mark.parametrize('how, error', [('dies', 'the process ended with 3'), ('hangs', 'no time left')])
def test_a_step_that_dies_or_takes_too_long_keeps_what_it_found(script, monkeypatch, tmp_path, how, error):
    (tmp_path/'step.py').write_text(DIES)
    monkeypatch.setattr(script, '__file__', str(tmp_path/'step.py'))
    if how == 'hangs': monkeypatch.setattr(script.subprocess, 'Popen', Hanging)
    found = script.apart(how, 'cpu', HOUR)
    assert (found['ok'], found['nf4_error'], found['error']) == (False, .1, error)
    assert 'device-side assert' in found['said'] or how == 'hangs'


def test_a_step_that_fails_says_where(script, monkeypatch, tmp_path):
    def fails(device, folder):
        yield dict(first=1)
        raise RuntimeError(f'no kernel for {device}')
    monkeypatch.setattr(script, 'STEPS', dict(fails=fails))
    script.run('fails', 'card', tmp_path/'found.json')
    found = json.loads((tmp_path/'found.json').read_text())
    assert (found['first'], found['ok'], found['error']) == (1, False, 'RuntimeError: no kernel for card')
    assert 'test_gpu_check' in found['at']


def test_only_what_is_not_there_is_installed(script, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(script.subprocess, 'run', lambda command, check: asked.append(command))
    here = f'pandas-{version("pandas")}-cp311-cp311-any.whl'
    wheels = [here, 'pandas-0.1-cp311-cp311-any.whl', 'nowhere-1-py3-none-any.whl']
    for name in wheels: (tmp_path/name).touch()
    assert script.install(tmp_path) == sorted(wheels[1:]) and len(asked) == 1
    assert {'--no-index', '--no-deps'} < set(asked[0]) and wheels[0] not in ' '.join(asked[0])


def test_a_wheel_keeps_one_cuda_library(script, tmp_path):
    names = [f'bitsandbytes/libbitsandbytes_{k}.so' for k in ('cpu', 'cuda118', 'cuda130', 'rocm70')]
    wheel = tmp_path/'bitsandbytes-1-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        for n in ('bitsandbytes/__init__.py', *names): z.writestr(n, 'x'*9)
        z.writestr('bitsandbytes-1.dist-info/RECORD', ''.join(f'{n},sha256=x,9\n' for n in names))
    script.stripped(tmp_path, '130')
    with zipfile.ZipFile(wheel) as z: left, record = z.namelist(), z.read('bitsandbytes-1.dist-info/RECORD').decode()
    assert left == ['bitsandbytes/__init__.py', names[0], names[2], 'bitsandbytes-1.dist-info/RECORD']
    assert record.split() == [f'{n},sha256=x,9' for n in (names[0], names[2])] and list(tmp_path.iterdir()) == [wheel]


@pytest.mark.skipif(not (CHECK.parents[1]/'.git').exists(), reason='git says what is tracked')
def test_what_is_carried_has_a_limit(script, monkeypatch, tmp_path, capsys):
    "Wheels and tracked files, as they lie on the disk."
    monkeypatch.setattr(sys, 'argv', ['gpu_check', '--strip', '130', '--wheels', str(tmp_path)])
    with open(tmp_path/'a-1-py3-none-any.whl', 'wb') as f: f.truncate(2**20)
    script.main()
    said = capsys.readouterr().out
    assert said.startswith('wheels 1.0 MiB, tracked files ') and float(said.split()[5]) > 5
    with open(tmp_path/'b-1-py3-none-any.whl', 'wb') as f: f.truncate(script.CARRIED)
    with pytest.raises(SystemExit, match='MiB in all; expected at most 64'): script.main()


def keys(x):
    "What a step has found, without the values."
    return {k: keys(v) for k, v in x.items()} if isinstance(x, dict) else None


@pytest.mark.slow
def test_every_step_runs_at_toy_size(tmp_path):
    "And the recorded run of it has the same steps, with the same findings."
    said, out = check(tmp_path/'x.json', '--minutes', '60')
    steps = out['steps']
    assert {n: x['error'] for n, x in steps.items() if not x['ok']} == {}, said.stderr[-2000:]
    assert list(steps) == STEPS and said.returncode == 0
    assert .05 < steps['four_bits']['nf4_error'] < .15 and abs(steps['four_bits']['after_a_step'] - .9) < .01
    assert steps['recipe']['resume'] == dict(killed_by=9, checkpoints=['checkpoint-1'], same_bits=True)
    assert len(steps['recipe']['scores']) == 6 and steps['dpo']['noise_nats'] < 1
    beside = steps['dpo']['runs_beside_mask']
    assert not beside['can_run'] and beside['gradient_apart'] == 0 < beside['norm']
    assert steps['sft']['plain_norms']['tok_s'] > 0 and steps['sft']['nf4_load']['seconds'] > 0
    with_dropout, without = (steps['sft'][k]['tok_s'] for k in ('autocast', 'no_dropout'))
    assert steps['sft']['no_dropout']['times_as_fast'] == round(without/with_dropout, 3) > 0
    assert steps['dpo']['masked']['tok_s'] > 0
    assert steps['sft']['autocast']['tok_s'] > 0 and len(steps['sft']['profile_ms']) == 10
    assert all(v for k, v in steps['merging'].items() if k != 'seconds')
    recorded = json.loads((CHECK.parent/'results'/'gpu_check_toy_cpu.json').read_text())
    assert keys(recorded) == keys(out)
