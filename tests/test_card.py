"""Where tensors live and how often the host waits, on a card that is the CPU in disguise (`fake_card.py`).

On the fake card a tensor of the CPU that meets one of the card raises, as on a real one. NF4 is not shown here.
"""
import json
from pathlib import Path

import pytest
from common import python

from solar_repro.core.data_files import write_rows
from solar_repro.paper import H6_TASKS
from solar_repro.stages.sources import TinyWorld
from solar_repro.tiny.base import random_base

HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Minute bases and benchmarks."
    d = tmp_path_factory.mktemp('card')
    for i, name in enumerate(('base', 'a', 'b')): random_base(d/name, seed=i)
    for task in H6_TASKS:
        (d/'bench'/task).mkdir(parents=True)
        for part, rows in TinyWorld().items(task, 8)[0].items(): write_rows(rows, d/'bench'/task/f'{part}.jsonl')
    return d


def on_card(what, folder): return json.loads(python(HERE/'on_fake_card.py', what, folder).stdout.splitlines()[-1])


MEETS = """
import sys; sys.path.insert(0, sys.argv[1])
import fake_card, torch
with fake_card.Card():
    x = torch.arange(6., device=fake_card.NAME)
    assert (x + 1).device == fake_card.CARD and not fake_card.SYNCS
    assert x[torch.tensor([0, 2])].device == fake_card.CARD               # CUDA takes indices of the CPU
    for meets in (lambda: x + torch.ones(6), lambda: torch.cat([x, torch.ones(1)])):
        try: meets()
        except RuntimeError as e: assert 'meets fakecard' in str(e), e
        else: sys.exit('a CPU tensor met one of the card')
    assert x.sum().item() == 15 and sum(fake_card.SYNCS.values()) == 1
    assert x.cpu().tolist() == [0, 1, 2, 3, 4, 5] and sum(fake_card.TO_CPU.values()) == 1
    assert torch.empty(6).copy_(x).sum() == 15 and sum(fake_card.TO_CPU.values()) == 2
    x.copy_(torch.ones(6))
    assert sum(fake_card.TO_CPU.values()) == 2
"""


def test_the_fake_card_sees_what_it_is_for(): python('-c', MEETS, HERE)


@pytest.mark.parametrize('what', ['kept', pytest.param('again', marks=pytest.mark.slow)])
def test_training_stays_on_the_card_and_the_host_seldom_waits(folder, what):
    stages = on_card(what, folder)
    assert list(stages) == ['sft', 'ref', 'dpo']
    for name, x in stages.items():
        if name == 'ref':
            assert not x['all_syncs'] and sum(x['all_fetched'].values()) <= 2, (name, x)    # the log-probabilities
            continue
        assert x['steps'] >= 2 and x['microbatches'] >= x['steps'], (name, x)
        metrics = 1 if name == 'sft' else 4
        assert x['syncs'] <= x['microbatches'] + metrics*x['steps'] and not x['fetched'], (name, x)
    assert stages['sft']['microbatches'] > stages['sft']['steps'], 'a step of several microbatches'


def test_six_benchmarks_run_on_the_card_with_two_waits_a_pass_at_most(folder):
    tasks = on_card('eval', folder)
    assert list(tasks) == list(H6_TASKS)
    for name, x in tasks.items():
        rows = 8 if name == 'gsm8k' else 1                                 # generation fetches the token of every row
        assert x['passes'] and x['syncs'] <= (1 + rows)*x['passes'] and not x['fetched'], (name, x)
        assert x['scores'][0] == x['scores'][1], (name, x)


@pytest.mark.slow
def test_merges_on_the_card_have_the_bits_of_the_cpu(folder):
    "And wait for the card once a tensor, to fetch what is merged."
    methods = on_card('merge', folder)
    assert len(methods) == 5
    for name, x in methods.items():
        waited, fetched = (sum(places.values()) for places in x['waits'])
        assert x['same'] and not waited and 0 < fetched <= x['tensors'], (name, x)


def test_geometry_and_rounding_on_the_card_have_the_numbers_of_the_cpu(folder):
    "Of sums of adapters and of a SLERP's checkpoint; all of it happens on the card that was asked for."
    x = on_card('geometry', folder)
    assert x['same'] == [True]*3 and x['rows'] == [20, 3, 2] and .5 < x['apart'] < .6, x
    assert {place.split(':')[0] for place in x['waits']} == {'checkpoints.py', 'adapters.py', 'merge.py'}, x
    assert not x['none']
