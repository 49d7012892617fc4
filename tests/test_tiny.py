"The tiny world: benchmarks are held out from all training text, and the shipped base is what its record says."

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from solar_repro.stages.sources import TinyWorld
from solar_repro.tiny.base import HEAD_PAGES, BaseSettings, build_tokenizer, corpus_hash, pretrain
from solar_repro.tiny.items import ITEMS, benchmark, leak_keys, number_key
from solar_repro.tiny.texts import ROWS, corpus, training_rows
from solar_repro.tiny.world import Problem, make_world, shipped_base

N_ITEMS = dict(arc=700, hellaswag=700, mmlu=700, truthfulqa=500, winogrande=600, gsm8k=500)
SMALL = dataclasses.replace(BaseSettings(), hidden_size=64, n_layers=2, n_heads=2, intermediate_size=128,
                            compiled=False, bf16=False)
STORY = re.compile(r'(?:At first )?[A-Z][a-z]+ (?:has|owns) \d+ \w+\.(?: [A-Z][a-z]+ \w+ \d+ \w+\.)+')


@pytest.fixture(scope='module')
def world(): return make_world()


@pytest.fixture(scope='module')
def training_text(world):
    "Some of the first reading, all of the second, more rows of every set than tiny uses, of three seeds."
    rows = [r for f in ROWS for seed in range(3) for r in training_rows(world, f, 4000, seed)]
    pages = [*corpus(world, 30_000, reading=1), *corpus(world, BaseSettings().n_again)]
    texts = [*pages, *(v if isinstance(v, str) else json.dumps(v) for r in rows for v in r.values())]
    return '\n'.join(dict.fromkeys('\n'.join(texts).split('\n')))         # lines recur; no key goes over two


def any_of(keys) -> re.Pattern:
    "Matches each of them, and reads a text once: its alternatives differ in their first characters."
    tree = {}
    for k in keys:
        at = tree
        for c in k: at = at.setdefault(c, {})
        at[''] = {}

    def pattern(at):
        return '' if '' in at else '(?:' + '|'.join(re.escape(c) + pattern(x) for c, x in at.items()) + ')'
    return re.compile(pattern(tree))


@pytest.mark.parametrize('task', [t for t in ITEMS if t != 'gsm8k'])
def test_no_item_occurs_in_training_text(world, training_text, task):
    keys = {k for row in benchmark(world, task, N_ITEMS[task])['test'] for k in leak_keys(task, row)}
    assert len(keys) > 50 and not any('\n' in k for k in keys)
    assert (found := any_of(keys).search(training_text)) is None, f'{task}: {found[0]!r} occurs in training text'


def test_leak_search_would_find_a_leak(world, training_text):
    "The same search finds the open (few-shot) rows, so an empty result above means something."
    for task in ('arc', 'hellaswag', 'mmlu', 'truthfulqa'):
        keys = [k for row in benchmark(world, task, 1, n_train=40)['train'] for k in leak_keys(task, row)]
        assert any_of(keys).search(training_text)[0] in keys, task


def test_held_numbers_occur_in_no_story(world, training_text):
    "GSM8K is held out by its numbers, whatever the words; one-step stories obey the same split."
    seen = {number_key(s) for s in STORY.findall(training_text)}
    assert len(seen) > 5000 and {len(k) for k in seen} == {2, 3, 4, 5, 6}
    assert not [k for k in seen if Problem(k[0], k[1:]).held]
    test = {number_key(r['question']) for r in benchmark(world, 'gsm8k', N_ITEMS['gsm8k'])['test']}
    assert len(test) == N_ITEMS['gsm8k'] and all(Problem(k[0], k[1:]).held for k in test) and not test & seen


def test_items_do_not_depend_on_hash_randomisation():
    code = (
        "import hashlib, json; from solar_repro.tiny.items import ITEMS, benchmark; from solar_repro.tiny.texts import"
        " ROWS, corpus, training_rows; from solar_repro.tiny.world import make_world;"
        " w = make_world(); print(hashlib.sha256(json.dumps([benchmark(w, t, 20) for t in ITEMS] +"
        " [training_rows(w, f, 20) for f in ROWS] + [list(corpus(w, 50, 0, k)) for k in (1, 2)]).encode()).hexdigest())"
    )
    out = {
        subprocess.run(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONHASHSEED': s},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in '12'
    }
    assert len(out) == 1


def test_shipped_base_is_what_its_record_says():
    base = shipped_base()
    record = json.loads((base/'record.json').read_text())
    settings = BaseSettings(**record['settings'])
    assert settings == BaseSettings()
    assert corpus_hash(settings, HEAD_PAGES) == record['corpus_head']
    assert corpus_hash(settings, HEAD_PAGES, 2) == record['corpus_head_again']
    assert record['n_steps'] == record['first']['n_steps'] + record['second']['n_steps']
    assert hashlib.sha256((base/'model.safetensors').read_bytes()).hexdigest() == record['weights']
    assert hashlib.sha256((base/'tokenizer.json').read_bytes()).hexdigest() == record['tokenizer']
    assert sum(f.stat().st_size for f in base.iterdir()) <= 12e6
    assert (
        build_tokenizer(make_world(settings.world_seed)).get_vocab()
        == json.loads((base / 'tokenizer.json').read_text())['model']['vocab']
    )


def test_a_short_training_learns_and_records(tmp_path):
    "The code path of the shipped base, shortened: the loss falls by nats and the record names the corpus."
    s = dataclasses.replace(SMALL, n_pages=1500, n_again=300)
    pretrain(tmp_path, s)
    record = json.loads((tmp_path/'record.json').read_text())
    assert record['settings'] == dataclasses.asdict(s) and record['corpus'] == corpus_hash(s, 1500)
    assert record['first']['loss'][0][1] > 6 and record['first']['loss'][-1][1] < 4.5
    assert record['loss'] == record['second']['loss'] and record['loss'][-1][1] < record['loss'][0][1]


def test_a_math_pair_is_alike_but_for_its_end_and_sft_has_mostly_seen_the_rejected_one():
    "Else every pair is in the right order before its training, and the set has nothing to teach."
    pairs, answers = (TinyWorld().rows(f'synth_math_{x}', 400, 0).rows for x in ('alignment', 'instruct'))
    assert all(r['chosen'] == f"{r['rejected']} So it is." for r in pairs)
    assert .05 < sum(r['completion'].endswith(' So it is.') for r in answers)/400 < .15


def test_rows_that_are_held_out_are_of_the_mix_that_is_trained_on():
    "New ones, so that what there are few of is rarer; not one in six where it is two in five."
    trained = TinyWorld().rows('alpaca_gpt4', 1200, 0).rows
    held = TinyWorld().rows('alpaca_gpt4', 300, 0, trained=trained).rows
    share = lambda rows: sum('Write a sentence' in r['prompt'] for r in rows)/len(rows)
    assert share(held) > .6*share(trained) and not {r['prompt'] + r['completion'] for r in held} & {
        r['prompt'] + r['completion'] for r in trained}
