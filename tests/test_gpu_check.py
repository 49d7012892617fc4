"""The check of a card runs whole at toy size where there is none, and writes what it found after every step."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_every_step_runs_at_toy_size(tmp_path):
    said, out = check(tmp_path/'x.json', '--minutes', '60')
    steps = out['steps']
    assert {n: x['error'] for n, x in steps.items() if not x['ok']} == {}, said.stderr[-2000:]
    assert list(steps) == STEPS and said.returncode == 0
    assert .05 < steps['four_bits']['nf4_error'] < .15 and abs(steps['four_bits']['after_a_step'] - .9) < .01
    assert steps['recipe']['resume'] == dict(checkpoints=['checkpoint-1'], same_bits=True)
    assert len(steps['recipe']['scores']) == 6 and steps['dpo']['noise_nats'] < 1
    assert steps['sft']['autocast']['tok_s'] > 0 and len(steps['sft']['profile_ms']) == 10
    assert all(v for k, v in steps['merging'].items() if k != 'seconds')
