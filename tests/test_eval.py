"""Scores recomputed by hand, prompts as text, and lm-eval kept in its place."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from solar_repro.core.data_files import write_rows
from solar_repro.stages.sources import TinyWorld
from solar_repro.eval import FEWSHOT_SEED, METRICS, build_requests, collect, evaluate, mc2, run_requests, task_folder
from solar_repro.inference.lm import RequestEncoder, SharedPrefixLM
from solar_repro.models.adapters import AdaptedModel, materialize
from solar_repro.models.loading import load_tokenizer, quiet
from solar_repro.paper import H6_TASKS
from solar_repro.pipeline.experiment import Experiment
from solar_repro.stages.graph import SFT_ROWS
from solar_repro.pipeline.results import taught
from solar_repro.reports import verify
from solar_repro.tiny.base import random_base

SHOTS = dict(arc=2, hellaswag=1, mmlu=2, truthfulqa=1, winogrande=2, gsm8k=2)
CHOICES = [t for t in H6_TASKS if t != 'gsm8k']
N = 9


@pytest.fixture(scope='module')
def point(tmp_path_factory):
    with quiet():
        return AdaptedModel(random_base(tmp_path_factory.mktemp('base')))


@pytest.fixture(scope='module')
def model(point):
    return materialize(point)


@pytest.fixture(scope='module')
def tok(point):
    return load_tokenizer(point.base)


@pytest.fixture(scope='module')
def bench():
    return {t: TinyWorld().items(t, N)[0] for t in H6_TASKS}


# ---- a second, independent account of what is asked and scored -----------------------------------------------------


def asked_text(task, row):  # the text given, and the possible continuations
    if task == 'arc':
        return f"Question: {row['question']}\nAnswer:", row['choices']['text']
    if task == 'hellaswag':
        return f"{row['activity_label']}: {row['ctx']}", row['endings']
    if task == 'truthfulqa':
        return f"Question: {row['question']}\nAnswer:", row['mc2_targets']['choices']
    if task == 'mmlu':
        options = ''.join(f'{l}. {c}\n' for l, c in zip('ABCD', row['choices']))
        return f"{row['question']}\n{options}Answer:", list('ABCD')


def gold(task, row):
    return dict(
        arc=lambda: row['choices']['label'].index(row['answerKey']),
        hellaswag=lambda: int(row['label']),
        mmlu=lambda: row['answer'],
        truthfulqa=lambda: 0,
        winogrande=lambda: int(row['answer']) - 1,
    )[task]()


def example(task, row):  # a row with its answer, as a few-shot example
    if task == 'gsm8k':
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    if task == 'winogrande':
        return row['sentence'].replace('_', row[f"option{row['answer']}"])
    text, choices = asked_text(task, row)
    return f'{text} {choices[gold(task, row)]}'


def requests_of(task, bench, n):  # of each item: the (context, continuation) pairs
    rng, out = random.Random(FEWSHOT_SEED), []
    for row in bench['test']:
        if task == 'mmlu':
            shots = [r for r in bench['train'] if r['subject'] == row['subject']][:n]
        else:
            shots = rng.sample(bench['train'], n)
        head = (
            f"The following are multiple choice questions (with answers) about {row['subject']}.\n\n"
            if task == 'mmlu'
            else ''
        )
        head += ''.join(example(task, s) + '\n\n' for s in shots)
        if task == 'winogrande':
            left, right = row['sentence'].split('_')
            out.append([(head + left + row[o], ' ' + right.strip()) for o in ('option1', 'option2')])
        elif task == 'gsm8k':
            out.append([(head + f"Question: {row['question']}\nAnswer:", None)])
        else:
            text, choices = asked_text(task, row)
            out.append([(head + text, ' ' + c) for c in choices])
    return out


def loglikelihood(model, tok, context, continuation):  # one forward pass in float64 sums, nats
    a, b = tok(context)['input_ids'], tok(context + continuation)['input_ids']
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([b[:-1]])).logits[0].double(), -1)
    return sum(logp[i - 1, b[i]].item() for i in range(len(a), len(b)))


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', H6_TASKS)
def test_every_prompt_is_the_expected_text(task, bench):
    asked = build_requests(task, bench[task], SHOTS[task])
    expected, seen = requests_of(task, bench[task], SHOTS[task]), 0
    for t, ids in zip(asked.tasks, asked.doc_ids):
        for i, doc_id in enumerate(ids):
            args = [r.args for r in t.instances if r.doc_id == i]
            if task == 'gsm8k':
                args = [(a[0], None) for a in args]
            assert args == expected[doc_id]
            seen += 1
    assert seen == N


def test_prompts_are_those_of_lm_evals_own_tasks():
    ours, theirs = Path(__import__('solar_repro').__file__).parent / 'tasks', Path(lm_eval.__file__).parent / 'tasks'
    both = lambda name, path: (
        load_yaml(ours / f'{name}.yaml', resolve_func=False),
        load_yaml(theirs / path, resolve_func=False),
    )
    for name, path in dict(
        arc='arc/arc_easy.yaml', mmlu='mmlu/default/_default_template_yaml', gsm8k='gsm8k/gsm8k.yaml'
    ).items():
        a, b = both(name, path)
        for k in ('output_type', 'doc_to_text', 'doc_to_target', 'doc_to_choice', 'fewshot_config'):
            assert a.get(k) == b.get(k), (name, k)
    assert a['metric_list'] == b['metric_list'] and a['filter_list'] == b['filter_list'][:1]  # GSM8K: strict match
    assert a['generation_kwargs']['until'][0] == b['generation_kwargs']['until'][0] == 'Question:'
    a, b = both('mmlu', 'mmlu/default/mmlu_anatomy.yaml')
    assert a['description'].replace('{{subject}}', 'anatomy') == b['description']


def test_winogrande_is_read_as_lm_eval_reads_it(bench):
    from lm_eval.tasks.winogrande import preprocess_winogrande as theirs

    t = build_requests('winogrande', bench['winogrande'], 0).tasks[0]
    for _, doc in t.doc_iterator():
        assert t.doc_to_text(doc) == theirs.doc_to_text(doc) and t.doc_to_target(doc) == theirs.doc_to_target(doc)
        assert t.doc_to_choice(doc) == theirs.doc_to_choice(doc)


# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', CHOICES)
def test_scores_follow_from_direct_loglikelihoods(task, bench, point, model, tok):
    result, records = evaluate(model, point.base, task, bench[task], SHOTS[task], 4)
    scores = []
    for row, pairs, r in zip(bench[task]['test'], requests_of(task, bench[task], SHOTS[task]), records, strict=True):
        lls = [loglikelihood(model, tok, *p) for p in pairs]
        assert r['loglikelihoods'] == pytest.approx(lls, abs=1e-4)  # nats; float32 sums over a padded batch
        if task == 'truthfulqa':
            p = [math.exp(x) for x in lls]
            scores.append(sum(x for x, l in zip(p, row['mc2_targets']['labels']) if l) / sum(p))
            plain = [(x, l) for x, l, w in zip(p, row['mc2_targets']['labels'], row['plain']) if w]
            assert r['plain'] == pytest.approx(sum(x for x, l in plain if l) / sum(x for x, _ in plain), abs=1e-4)
        else:
            per = [len(c) for c in asked_text(task, row)[1]] if METRICS[task] == 'acc_norm' else [1] * len(lls)
            best = max(range(len(lls)), key=lambda i: lls[i] / per[i])
            assert (r['prediction'], r['gold']) == (best, gold(task, row))
            scores.append(float(best == gold(task, row)))
        assert r['score'] == pytest.approx(scores[-1], abs=1e-4)
    mean = sum(scores) / N
    assert result['score'] == pytest.approx(mean, abs=1e-4) and result['n'] == N and result['metric'] == METRICS[task]
    padded = [*scores, 0, 0, 1, 1]
    floor = math.sqrt(sum((x - sum(padded) / (N + 4)) ** 2 for x in padded) / (N + 4) ** 2)
    assert result['se'] == pytest.approx(
        max(math.sqrt(sum((x - mean) ** 2 for x in scores) / (N - 1) / N), 0 if task == 'truthfulqa' else floor),
        abs=1e-4,
    )


def test_generation_is_greedy_and_stops(bench, point, model, tok):
    _, records = evaluate(model, point.base, 'gsm8k', bench['gsm8k'], 1, 4)
    for ((context, _),), r in zip(requests_of('gsm8k', bench['gsm8k'], 1), records, strict=True):
        ids = tok(context)['input_ids']
        start = len(ids)
        for _ in range(48):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tok.eos_token_id or 'Question:' in tok.decode(ids[start:]):
                break
        assert r['text'] == tok.decode(ids[start:], skip_special_tokens=True).split('Question:')[0]


class Says:
    "A stand-in for a model that says given texts."

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.max_length = tokenizer, texts, 1024

    def generate_until(self, requests, disable_tqdm):
        return self.texts

    def longest(self, requests):
        return 64


@pytest.mark.parametrize(
    'text, number, right',
    [
        ('6 + 13 = 19.\n#### 19', '19', True),
        ('#### 19.', '19.', True),
        ('#### 1,9', '1,9', True),
        ('#### 19\n\n#### 20', '19', True),
        ('19', '[invalid]', False),
        ('The answer is 19.', '[invalid]', False),
        ('####19', '[invalid]', False),
        ('#### -19', '-19', False),
        ('#### 190', '190', False),
        ('', '[invalid]', False),
        ('#### $19', '[invalid]', False),
    ],
)
def test_gsm8k_counts_only_the_number_after_the_marks(text, number, right, tok):
    rows = [dict(question='How many?', answer='6 + 13 = 19.\n#### 19')] * 2
    asked = build_requests('gsm8k', dict(train=rows, test=rows), 0)
    run_requests(Says(tok, [text, '#### 19']), 'gsm8k', asked)
    first, second = collect('gsm8k', asked)
    assert (first['prediction'], first['score'], first['gold']) == (number, float(right), '19')
    assert (first['text'], second['score']) == (text, 1.0)


def test_mc2_of_very_unlikely_answers_is_a_number():
    doc = dict(mc2_targets=dict(choices=list('abc'), labels=[1, 0, 0]), plain=[True, True, False])
    far = mc2(doc, [(-3000 + math.log(p), False) for p in (0.2, 0.2, 0.6)])
    assert far['mc2'] == pytest.approx(0.2) and far['plain'] == pytest.approx(0.5)


@pytest.mark.parametrize('task', H6_TASKS)
def test_batches_of_one_and_many_agree(task, bench, point, model):
    (one, a), (many, b) = (evaluate(model, point.base, task, bench[task], SHOTS[task], n) for n in (1, 32))
    for x, y in zip(a, b, strict=True):
        assert x['asked'] == y['asked']
        if task == 'gsm8k':
            assert x['text'] == y['text']
        # nats; padding reorders float32 sums
        else:
            assert x['loglikelihoods'] == pytest.approx(y['loglikelihoods'], abs=1e-4)
    assert one['score'] == pytest.approx(many['score'], abs=1e-4)


@pytest.mark.parametrize('task', H6_TASKS)
def test_lm_eval_says_the_same_on_the_same_folder(task, bench, point, model, tok, tmp_path):
    ours, _ = evaluate(model, point.base, task, bench[task], SHOTS[task], 4)
    names = task_folder(task, bench[task], SHOTS[task], tmp_path)
    got = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tok, batch_size=4),
        tasks=list(names),
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    key = METRICS[task] + (',strict-match' if task == 'gsm8k' else ',none')
    theirs = sum(got['results'][n][key] * len(ids) for n, ids in names.items()) / N
    assert ours['score'] == pytest.approx(theirs, abs=1e-6)  # mc2 is not a count of items; float32 sums


# ---- reuse ---------------------------------------------------------------------------------------------------------


def test_requests_are_built_once_and_hold_nothing_of_the_last_model(bench, point, model, tmp_path):
    with quiet():
        other = AdaptedModel(random_base(tmp_path / 'other', seed=1))
    first = evaluate(model, point.base, 'arc', bench['arc'], 2, 4)
    asked = build_requests('arc', bench['arc'], 2)
    second = evaluate(materialize(other), other.base, 'arc', bench['arc'], 2, 4)
    assert build_requests('arc', bench['arc'], 2) is asked
    assert second[1][0]['loglikelihoods'] != first[1][0]['loglikelihoods']
    assert evaluate(model, point.base, 'arc', bench['arc'], 2, 4) == first  # bit for bit


def test_a_folder_of_rows_is_the_same_benchmark(bench, point, model, tmp_path):
    for k, rows in bench['mmlu'].items():
        write_rows(rows, tmp_path / f'{k}.jsonl')
    of_rows = evaluate(model, point.base, 'mmlu', bench['mmlu'], 2, 4)
    assert evaluate(model, point.base, 'mmlu', tmp_path, 2, 4) == of_rows


def test_mmlu_records_keep_the_order_of_the_items(bench, point, model):
    _, records = evaluate(model, point.base, 'mmlu', bench['mmlu'], 2, 4)
    assert [r['doc_id'] for r in records] == list(range(N))
    assert [(r['subject'], r['gold']) for r in records] == [(d['subject'], d['answer']) for d in bench['mmlu']['test']]


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_errors_name_what_to_change(bench, point, model, tok):
    with pytest.raises(
        ValueError, match=r'tiny_mmlu_\w+ has \d+ rows for 30 examples.*Lower mmlu in \[eval.num_fewshot\]'
    ):
        evaluate(model, point.base, 'mmlu', bench['mmlu'], 30, 4)
    with pytest.raises(ValueError, match='1 test items.*at least 2'):
        evaluate(model, point.base, 'arc', dict(bench['arc'], test=bench['arc']['test'][:1]), 0, 4)
    with pytest.raises(ValueError, match="no task 'boolq'"):
        evaluate(model, point.base, 'boolq', bench['arc'], 0, 4)
    asked = build_requests('gsm8k', bench['gsm8k'], 2)
    with pytest.raises(ValueError, match='longest request of gsm8k has .* at most 60'):
        run_requests(SharedPrefixLM(model, RequestEncoder(tok), max_length=60), 'gsm8k', asked)


def test_weights_with_nan_give_no_score(bench, point):
    broken = materialize(point)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite'):
        evaluate(broken, point.base, 'truthfulqa', bench['truthfulqa'], 0, 4)


OFFLINE = """
import json, socket, sys
def no(*a, **k): raise RuntimeError('network')
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = no
from pathlib import Path
from solar_repro.stages.sources import TinyWorld
from solar_repro.eval import evaluate
from solar_repro.models.adapters import AdaptedModel, materialize
base = Path(sys.argv[1])
for t in ('arc', 'gsm8k'): evaluate(materialize(AdaptedModel(base)), base, t, TinyWorld().items(t, 3)[0], 1, 4)
"""


def test_nothing_is_fetched_written_at_home_or_left_behind(point, tmp_path):
    home, scratch, here = (tmp_path / x for x in ('home', 'scratch', 'here'))
    for p in (home, scratch, here):
        p.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'XDG_', 'LM'))}
    root = Path(__import__('solar_repro').__file__).parent.parent
    done = subprocess.run(
        [sys.executable, '-c', OFFLINE, str(point.base)],
        cwd=here,
        capture_output=True,
        text=True,
        env=env | dict(HOME=str(home), TMPDIR=str(scratch), PYTHONPATH=str(root)),
    )
    assert done.returncode == 0, done.stderr
    assert [p for d in (home, scratch, here) for p in d.rglob('*') if p.is_file()] == []
    assert done.stdout == done.stderr == ''


# ---- rows that were held out -----------------------------------------------------------------------------------------


def test_rows_held_out_are_not_trained_on_and_their_answers_are_counted_again(full, monkeypatch):
    exp = Experiment('smoke', store=full)
    held = [n for n in exp.graph if n.startswith('held/')]
    assert len(held) == 5
    for n in held:
        rows, trained = ({tuple(r.values()) for r in exp.rows(m)} for m in (n, n.replace('held/', 'data/')))
        assert len(rows) == exp.profile.eval.n_own and not rows & trained
    assert verify._own_problems(exp) == []
    read = verify.pd.read_parquet

    def forged(file):
        x = read(file)
        x.loc[1, 'score'] = 1 - x.loc[1, 'score']
        return x

    monkeypatch.setattr(verify.pd, 'read_parquet', forged)
    found = verify._own_problems(exp)
    assert [what for _, what, *_ in found] == ['score of item 1']*11
    assert {where.split('/')[1] for where, *_ in found} == {'base', *SFT_ROWS}


def test_a_gain_is_the_difference_of_two_models_on_the_same_rows(full):
    exp = Experiment('smoke', store=full)
    gains = taught(exp).set_index(['set', 'model'])
    held = [n.removeprefix('held/') for n in exp.graph if n.startswith('held/')]
    assert list(dict.fromkeys(gains.index.get_level_values('set'))) == held
    after, before = (exp.build(f'own/{m}/openorca').path/'items.parquet' for m in ('SFT v3', 'base'))
    after, before = verify.pd.read_parquet(after), verify.pd.read_parquet(before)
    assert (after['asked'] == before['asked']).all() and (after['gold'] == before['gold']).all()
    assert gains.loc[('openorca', 'SFT v3'), 'gain'] == pytest.approx((after['score'] - before['score']).mean())
    none = Experiment(exp.profile.model_copy(update=dict(eval=exp.profile.eval.model_copy(update=dict(n_own=0)))),
                      store=full)
    assert taught(none).empty and not any(n.startswith(('own/', 'held/')) for n in none.graph)
