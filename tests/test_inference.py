"""Our backend against lm-eval's own on every request of all six benchmarks, and what interruptions, memory and the
next model leave behind."""

import argparse
import hashlib
import json
import runpy
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save
from tokenizers.processors import TemplateProcessing
from toy_models import shaped
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from solar_repro.stages.sources import TinyWorld
from solar_repro.core.protocols import PROTOCOLS, score_as
from solar_repro.eval import allowed, build_requests
from solar_repro.inference import forward as forward_module, generation as generation_module, lm as lm_module
from solar_repro.models import resident as resident_module
from solar_repro.inference.lm import RequestEncoder, AnswerCache, SharedPrefixLM, encode_pairs, stopper
from solar_repro.inference.prefix_tree import Limits, Request, batches, divide, grow
from solar_repro.models.resident import Resident
from solar_repro.inference.forward import limits_of, run_rows, run_stems
from solar_repro.models.adapters import AdaptedModel, materialize, save_adapter
from solar_repro.models.loading import load_tokenizer, quiet
from solar_repro.core.config import load_profile
from solar_repro.stages.graph import build_graph
from solar_repro.pipeline.experiment import Experiment
from solar_repro.paper import H6_TASKS
from solar_repro.tiny.base import random_base

SHOTS = dict(arc=3, hellaswag=1, mmlu=3, truthfulqa=1, winogrande=2, gsm8k=2)
CLOSE = 1e-4  # nats: float32 sums in another order


def weights_digest(model):
    "Of all weights: two models are the same if theirs is."
    return hashlib.sha256(save({n: w.clone() for n, w in model.state_dict().items()})).hexdigest()


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    with quiet():
        return random_base(tmp_path_factory.mktemp('base') / 'base')


@pytest.fixture(scope='module')
def tok(base):
    return load_tokenizer(base)


@pytest.fixture(scope='module')
def bos(base):
    "A tokenizer that begins every text with a BOS, as Llama's do."
    t = load_tokenizer(base)
    t.add_special_tokens(dict(bos_token='<bos>'))
    t.backend_tokenizer.post_processor = TemplateProcessing(
        single='<bos> $A', pair='<bos> $A $B', special_tokens=[('<bos>', t.bos_token_id)]
    )
    return t


@pytest.fixture(scope='module')
def model(tok):
    return shaped(len(tok) + 1)


def theirs(model, tok, **kwargs):
    with quiet():
        return HFLM(pretrained=model, tokenizer=tok, logits_cache=False, **kwargs)


def requests_of(task, n=8):
    return [r for t in build_requests(task, TinyWorld().items(task, n)[0], SHOTS[task]).tasks for r in t.instances]


def same(requests, model, tok, batch, add_bos=None, window=None):
    ours = SharedPrefixLM(model, RequestEncoder(tok, add_bos), batch, window)
    hf = theirs(model, tok, batch_size=batch, add_bos_token=add_bos, max_length=window)
    if requests[0].request_type == 'generate_until':
        assert ours.generate_until(requests) == hf.generate_until(requests, disable_tqdm=True)
    else:
        for (a, g), (b, h) in zip(
            ours.loglikelihood(requests), hf.loglikelihood(requests, disable_tqdm=True), strict=True
        ):
            assert a == pytest.approx(b, abs=CLOSE) and g == h


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    "The tokens of requests for log-likelihoods that go through a model, padding left out: stems, rows."
    n = []

    def stems_counted(model, stems):
        n.append(sum(map(len, stems)))
        return run_stems(model, stems)

    def rows_counted(model, stems, cache, chunk, scored):
        n.append(sum(len(r.tokens) for _, r in chunk))
        return run_rows(model, stems, cache, chunk, scored)

    monkeypatch.setattr(lm_module, 'run_stems', stems_counted)
    monkeypatch.setattr(lm_module, 'run_rows', rows_counted)
    return n


def asked(requests, tok):
    "The tokens that they hold, each for itself; the last is not read."
    return sum(len(tok(''.join(r.args))['input_ids']) - 1 for r in requests)


@pytest.mark.parametrize('batch', (1, 32))
@pytest.mark.parametrize('task', H6_TASKS)
def test_every_request_of_every_benchmark(task, batch, model, tok, computed):
    requests = requests_of(task)
    same(requests, model, tok, batch)
    assert task == 'gsm8k' or 0 < sum(computed) < asked(requests, tok)


@pytest.mark.parametrize('add_bos', (None, True, False))
@pytest.mark.parametrize('task', H6_TASKS)
def test_with_a_bos_and_without(task, add_bos, model, bos):
    same(requests_of(task, 3), model, bos, 8, add_bos)


@pytest.mark.parametrize('kind', ((LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)))
@pytest.mark.parametrize('tied', (True, False))
def test_tied_and_untied_embeddings(tied, kind, tok):
    m = shaped(len(tok), kind, tied, **(dict(sliding_window=None) if kind[0] is MistralConfig else {}))
    assert (m.lm_head.weight is m.model.embed_tokens.weight) == tied
    for task in H6_TASKS:
        same(requests_of(task, 3), m, tok, 8)


@pytest.mark.parametrize('task', [t for t in H6_TASKS if t != 'gsm8k'])
def test_contexts_about_the_window_are_cut_alike(task, model, tok):
    requests = requests_of(task, 3)
    longest = max(len(tok(''.join(r.args))['input_ids']) for r in requests)
    least = 1 + max(len(tok(r.args[1])['input_ids']) for r in requests)
    for over in (-2, -1, 0, 1, 2, 30):
        same(requests, model, tok, 8, window=max(longest - over, least))


def test_generation_cuts_its_context_alike(model, tok):
    requests = requests_of('gsm8k', 4)
    for window in (60, 100):
        same(requests, model, tok, 1, window=window)


def test_empty_contexts_and_whole_texts(model, tok, bos):
    texts = ['the pot is red.', ' the pot', 'a', ' '.join(['the red pot is near the box'] * 9)]
    for t in (tok, bos):
        same([Instance('loglikelihood', {}, ('', x), i) for i, x in enumerate(texts)], model, t, 4)
        whole = [Instance('loglikelihood_rolling', {}, (x,), i) for i, x in enumerate(texts)]
        for window in (512, 9):
            got = SharedPrefixLM(model, RequestEncoder(t), max_length=window).loglikelihood_rolling(whole)
            assert got == pytest.approx(
                theirs(model, t, batch_size=1, max_length=window).loglikelihood_rolling(whole, disable_tqdm=True),
                abs=1e-3,
            )


def test_long_answers_over_a_vocabulary_of_real_size(tok):
    """torch's log_softmax is off by some 2e-6 nats a token on a CPU; a more careful sum than lm-eval's would add
    up to more than CLOSE."""
    m, text = shaped(49152), ' '.join(['is near the box and the red pot'] * 20)
    m.lm_head.bias = torch.nn.Parameter(torch.zeros(49152))
    # its words are likely ones, so that the sum stays small enough for seven digits
    m.lm_head.bias.data[tok(text)['input_ids']] = 14.0
    requests = [Instance('loglikelihood', {}, ('the red pot', ' ' + text[:n]), n) for n in (9, 200, len(text))]
    same(requests, m, tok, 4)
    assert abs(SharedPrefixLM(m, RequestEncoder(tok)).loglikelihood(requests)[-1][0]) < 1000


def test_bfloat16_runs_and_stays_near(model, tok):
    half = shaped(len(tok) + 1).to(torch.bfloat16)
    requests = requests_of('truthfulqa', 3)
    exact = SharedPrefixLM(model, RequestEncoder(tok)).loglikelihood(requests)
    got = SharedPrefixLM(half, RequestEncoder(tok)).loglikelihood(requests)
    wrong = HFLM(pretrained=half, tokenizer=tok, logits_cache=False).loglikelihood(requests, disable_tqdm=True)
    miss = lambda xs: sum(abs(a - b) for (a, _), (b, _) in zip(xs, exact))
    assert miss(got) < 1.5 * miss(wrong)  # no further from float32 than lm-eval's own bfloat16


def test_eager_attention_too(tok):
    m = shaped(len(tok))
    m.set_attn_implementation('eager')
    same(requests_of('mmlu', 3), m, tok, 8)


def test_what_cannot_be_right_is_refused(tok):
    m = shaped(len(tok), (MistralConfig, MistralForCausalLM), sliding_window=64)
    with pytest.raises(ValueError, match='slides over 64 tokens'):
        SharedPrefixLM(m, RequestEncoder(tok))
    m = shaped(len(tok))
    m.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match='repetition_penalty'):
        SharedPrefixLM(m, RequestEncoder(tok)).generate_until(requests_of('gsm8k', 2))


# ---- what is computed ----------------------------------------------------------------------------------------------


def test_a_context_is_computed_once_for_all_choices(model, tok, computed):
    requests = requests_of('arc', 6)
    lm = SharedPrefixLM(model, RequestEncoder(tok), 1)  # batches of one: nothing is padding
    lm.loglikelihood(requests)
    contexts = {r.args[0] for r in requests}
    once = sum(len(tok(c)['input_ids']) for c in contexts) + sum(
        len(tok(r.args[1].strip())['input_ids']) - 1 for r in requests
    )
    assert 0 < sum(computed) <= once < asked(requests, tok) / 2


def test_the_examples_of_a_subject_are_computed_once(model, tok, computed):
    row = lambda q: dict(subject='botany', question=q, choices=list('wxyz'), answer=0)
    bench = dict(
        train=[row('the red pot')] * 3, test=[row(f'the {c} pot') for c in ('red', 'blue', 'green', 'big', 'old')]
    )
    requests = build_requests('mmlu', bench, 3).tasks[0].instances
    lm = SharedPrefixLM(model, RequestEncoder(tok), 64)
    lm.loglikelihood(requests)
    lengths = [len(tok(c)['input_ids']) for c in {r.args[0] for r in requests}]
    assert 0 < sum(computed) < 1.9 * max(lengths) < sum(lengths) / 2


def test_only_scored_positions_have_logits(model, tok, monkeypatch):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[-2]))
    requests = requests_of('truthfulqa', 3)
    try:
        SharedPrefixLM(model, RequestEncoder(tok)).loglikelihood(requests)
    finally:
        hook.remove()
    assert 0 < sum(seen) <= sum(len(c) for _, c in encode_pairs(RequestEncoder(tok), [r.args for r in requests]))


def test_rows_that_are_done_leave(model, tok, monkeypatch):
    widths = []
    run = forward_module.forward
    monkeypatch.setattr(
        generation_module, 'forward', lambda m, ids, *a, **k: widths.append(ids.shape[0]) or run(m, ids, *a, **k)
    )
    texts = [f'the {w} pot' for w in 'red blue green big old new small'.split()]
    ask = lambda until: [
        Instance('generate_until', {}, (t, dict(until=until, max_gen_toks=30)), i) for i, t in enumerate(texts)
    ]
    free = SharedPrefixLM(model, RequestEncoder(tok)).generate_until(ask([]))
    widths.clear()
    words = [t.split()[k] for t, k in zip(free, (1, 3, 9, 12)) if len(t.split()) > k]
    cut = SharedPrefixLM(model, RequestEncoder(tok)).generate_until(ask(words))
    assert [c == f for c, f in zip(cut, free)].count(False) >= 3
    steps = widths[1:]
    assert steps[-1] < steps[0] and all(a >= b for a, b in pairwise(steps))


def test_neighbours_share_only_what_pays():
    shots = tuple(range(100, 150))
    far = [(*shots, i, *range(10 + i, 40 + i)) for i in range(4)]
    assert divide(far)[1] == [(0, 4, 50)]
    assert divide([(1, 2, i, *range(10, 60)) for i in range(4)])[1] == [(i, i + 1, 52) for i in range(4)]
    both = sorted([(9, *shots, i, 7) for i in range(3)] + [(9, 8, *shots, i, 7) for i in range(3)])
    assert [p for _, _, p in divide(both)[1]] == [52, 51]


def test_batches_hold_no_more_than_their_limits():
    requests = [Request(tuple(range(i % 7, 40 + i)), (1, 2)) for i in range(40)]
    x = Limits(150, 9, 5, 1000, 50)
    scored = 0
    for b in batches(grow(requests), x):
        n = max(map(len, b.stems))
        assert len(b.stems) == 1 or len(b.stems) * n <= x.n_tok
        for c in b.chunks:
            scored += sum(len(r.spots) for _, r in c)
            assert len(c) <= x.n_rows and (len(c) == 1 or len(c) * max(len(r.tokens) for _, r in c) <= x.n_tok)
            assert len(c) == 1 or sum(len(s) for _, r in c for _, s in r.spots) <= x.n_logits
    assert scored == len(requests)


@pytest.mark.parametrize(
    'limits', (Limits(2048, 4, 64, 10**5), Limits(64, 10**4, 64, 256), Limits(2048, 10**4, 3, 10**5))
)
def test_answers_do_not_depend_on_the_limits(limits, model, tok):
    for task in ('truthfulqa', 'gsm8k'):
        requests = requests_of(task, 5)
        a, b = SharedPrefixLM(model, RequestEncoder(tok)), SharedPrefixLM(model, RequestEncoder(tok))
        b.limits = limits
        if task == 'gsm8k':
            assert a.generate_until(requests) == b.generate_until(requests)
        else:
            assert [x for x, _ in a.loglikelihood(requests)] == pytest.approx(
                [x for x, _ in b.loglikelihood(requests)], abs=CLOSE
            )


# ---- memory and interruptions --------------------------------------------------------------------------------------


def test_too_little_memory_halves_the_batches(model, tok, monkeypatch):
    requests, run, refused = requests_of('hellaswag', 6), forward_module.forward, []
    expected = SharedPrefixLM(model, RequestEncoder(tok)).loglikelihood(requests)

    def small(m, ids, *a, **k):
        if ids.numel() > 150:
            refused.append(ids.shape)
            raise torch.OutOfMemoryError('no')
        return run(m, ids, *a, **k)

    monkeypatch.setattr(forward_module, 'forward', small)
    lm = SharedPrefixLM(model, RequestEncoder(tok))
    before = lm.limits
    assert [x for x, _ in lm.loglikelihood(requests)] == pytest.approx([x for x, _ in expected], abs=CLOSE)
    assert refused and lm.limits.n_tok < before.n_tok
    monkeypatch.setattr(
        forward_module, 'forward', lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError('never'))
    )
    with pytest.raises(MemoryError, match='smaller model'):
        SharedPrefixLM(model, RequestEncoder(tok)).loglikelihood(requests)


@pytest.mark.parametrize('task', ('truthfulqa', 'gsm8k'))
def test_an_interrupted_benchmark_goes_on_where_it_stopped(task, model, tok, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_module, 'KEEP_S', 0.0)
    ask = lambda lm, requests: getattr(lm, requests[0].request_type)(requests)
    requests = requests_of(task, 6)
    expected = ask(SharedPrefixLM(model, RequestEncoder(tok), 2), requests)

    def stop(done, total):
        if done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(SharedPrefixLM(model, RequestEncoder(tok), 2, scratch=tmp_path, on_progress=stop), requests)
    first = sum(len(json.loads(l.split(' ', 1)[1])) for f in tmp_path.iterdir() for l in f.read_text().splitlines())
    assert len(requests) / 2 <= first < len(requests)
    progress = []
    lm = SharedPrefixLM(
        model, RequestEncoder(tok), 2, scratch=tmp_path, on_progress=lambda done, total: progress.append(done)
    )
    assert ask(lm, requests) == expected  # bit for bit: the batches are the same
    assert progress[0] > first and progress[-1] == len(requests)
    other = SharedPrefixLM(model, RequestEncoder(tok), 2, scratch=tmp_path, max_length=400)
    before = len(list(tmp_path.iterdir()))
    ask(other, requests)
    assert len(list(tmp_path.iterdir())) == before + 1  # another window has a file of its own


DAMAGE = {
    'a changed digit': lambda line: line.replace(b'1.5', b'9.5'),
    'a torn line': lambda line: line[: len(line) // 2],
    'no UTF-8': lambda line: b'\xff\xfe' + line,
    'JSON of another shape': lambda line: b'{"0": 1.5}\n',
    'another shape, rightly summed': lambda line: lm_module._checksum(b'[1, 2]') + b' [1, 2]\n',
    'a line without end': lambda line: line[:-1],
    'an empty line': lambda line: b'\n',
    'another line ending': lambda line: line[:-1] + b'\r\n',
}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('at', (0, 1, 2))
def test_a_line_that_is_not_as_it_was_written_is_computed_again(damage, at, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_module, 'KEEP_S', -1)
    file = tmp_path / 'answers.jsonl'
    kept = AnswerCache(file)
    for i in range(3):
        kept.add([(i, (-1.5, True))])
    lines = file.read_bytes().splitlines(keepends=True)
    whole, lines[at] = list(lines), DAMAGE[damage](lines[at])
    assert lines[at] != whole[at]
    file.write_bytes(b''.join(lines))
    again = AnswerCache(file)
    # a line that ran into the next one takes it along
    torn = {at, at + 1} if not lines[at].endswith(b'\n') else {at}
    assert again.known == {i: (-1.5, True) for i in range(3) if i not in torn}
    again.add([(i, (-1.5, True)) for i in range(3) if i in torn])
    assert AnswerCache(file).known == {i: (-1.5, True) for i in range(3)}


def test_memory_that_torch_holds_and_does_not_use_is_free(monkeypatch):
    for name, got in dict(mem_get_info=(5, 100), memory_reserved=40, memory_allocated=30).items():
        monkeypatch.setattr(torch.cuda, name, lambda d, got=got: got)
    assert forward_module.free_bytes(torch.device('cuda')) == 5 + 40 - 30


def test_a_card_takes_more_logits_at_a_time_than_eight_rows_of_hellaswag(model, monkeypatch):
    monkeypatch.setattr(forward_module, 'free_bytes', lambda d: 60 * 2**30)
    here = limits_of(model, 64)

    class OnCard:
        config, dtype, device = (
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=48,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
            torch.bfloat16,
            torch.device('cuda'),
        )

    card = limits_of(OnCard, 64)
    assert card.n_logits >= 64 * 4 * 30 and card.n_logits * 8 * 32000 <= 4 * 2**30 and here.n_tok == 4096


def test_plans_are_made_once_for_all_models(model, tok, monkeypatch):
    requests = requests_of('winogrande', 7)
    SharedPrefixLM(model, RequestEncoder(tok)).loglikelihood(requests)
    monkeypatch.setattr(lm_module, 'grow', lambda *a: pytest.fail('planned again'))
    monkeypatch.setattr(RequestEncoder, 'encode', lambda *a, **k: pytest.fail('encoded again'))
    other = shaped(len(tok) + 1, tied=True)
    SharedPrefixLM(other, RequestEncoder(tok)).loglikelihood(requests)


def test_a_stop_string_is_seen_at_its_last_token(tok):
    text = 'the pot is red.\n#### 4\n\nQuestion: What is'
    ids = tok.encode(text)
    for stop in ('Question:', '####', '#### 4', 'is red', '.', 'pot is', '\n\n', '\n'):
        done, k = stopper(tok, [stop], []), next(k for k in range(1, len(ids) + 1) if stop in tok.decode(ids[:k]))
        assert [done(ids[:j]) for j in range(1, k + 1)] == [False] * (k - 1) + [True], stop


# ---- one base, many points -----------------------------------------------------------------------------------------


def adapter(out, model, seed, r=4, only=''):
    g = torch.Generator().manual_seed(seed)
    linear = {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and 'lm_head' not in n and only in n
    }
    return save_adapter(
        {
            f'base_model.model.{n}.lora_{x}.weight': torch.randn(
                (r, m.in_features) if x == 'A' else (m.out_features, r), generator=g
            )
            for n, m in linear.items()
            for x in 'AB'
        },
        r,
        2 * r,
        out,
    )


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_fifteen_models_cost_one_load_and_the_base_comes_back(dtype, base, tok, tmp_path, monkeypatch):
    m = materialize(AdaptedModel(base)).to(getattr(torch, dtype))
    m.save_pretrained(tmp_path / 'base')
    tok.save_pretrained(tmp_path / 'base')
    a, b, c = (adapter(tmp_path / f'a{i}', m, i, only=o) for i, o in enumerate(('', 'mlp', 'q_proj')))
    plain = AdaptedModel(tmp_path / 'base')
    points = [
        AdaptedModel(plain.base, t) for t in (((a, 1.0),), ((b, 0.4), (c, 0.6)), ((c, -1.0),), ((a, 0.5), (b, 0.5)))
    ]
    expected = {p: weights_digest(materialize(p)) for p in (plain, *points)}
    assert len(set(expected.values())) == 5
    loads = []
    load = resident_module.materialize
    monkeypatch.setattr(resident_module, 'materialize', lambda *x: loads.append(x) or load(*x))
    resident = Resident()
    for p in (plain, *points, plain, *reversed(points), plain):
        got = resident.become(p)
        assert (
            weights_digest(got) == expected[p]
            and not got.training
            and not any(w.requires_grad for w in got.parameters())
        )
    assert len(loads) == 1


def test_a_model_half_written_is_written_again(base, tmp_path, monkeypatch):
    m = materialize(AdaptedModel(base))
    one, two = (AdaptedModel(base, ((adapter(tmp_path / f'{i}', m, i), 1.0),)) for i in range(2))
    resident, write, left = Resident(), resident_module.add_delta, [5]
    resident.become(one)

    def stop(*x):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(*x)

    monkeypatch.setattr(resident_module, 'add_delta', stop)
    with pytest.raises(KeyboardInterrupt):
        resident.become(two)
    monkeypatch.setattr(resident_module, 'add_delta', write)
    for p in (one, AdaptedModel(base), two):
        assert weights_digest(resident.become(p)) == weights_digest(materialize(p))


def test_a_checkpoint_of_its_own_takes_the_same_memory(base, tmp_path):
    with quiet():
        other = random_base(tmp_path / 'other', seed=5)
    a = adapter(tmp_path / 'a', materialize(AdaptedModel(base)), 1)
    resident = Resident()
    first = resident.become(AdaptedModel(base, ((a, 1.0),)))
    for p in (AdaptedModel(other), AdaptedModel(base), AdaptedModel(other, ((a, 0.5),)), AdaptedModel(base)):
        assert resident.become(p) is first and weights_digest(first) == weights_digest(materialize(p))
    broken = save_adapter(
        {f'base_model.model.model.layers.99.mlp.up_proj.lora_{x}.weight': torch.ones(4, 4) for x in 'AB'},
        4,
        4,
        tmp_path / 'b',
    )
    with pytest.raises(ValueError, match='they change'):
        resident.become(AdaptedModel(base, ((broken, 1.0),)))


# ---- protocols -----------------------------------------------------------------------------------------------------


def test_both_protocols_from_one_record(tok, bos):
    assert allowed(RequestEncoder(tok)) == PROTOCOLS
    assert allowed(RequestEncoder(bos)) == ('modern',) and allowed(RequestEncoder(bos, False)) == ('leaderboard-2023',)
    says = [
        ('2 + 2 = 4.\n#### 4', 1.0, 1.0),
        ('so: 4.\n#### 4', 1.0, 0.0),
        ('#### $4', 0.0, 0.0),
        ('#### 4.', 1.0, 0.0),
        ('#### 1,004', 1.0, 1.0),
    ]
    golds = ['4', '4', '4', '4', '1,004']
    records = pd.DataFrame([dict(text=t, gold=g, score=m) for (t, m, _), g in zip(says, golds)])
    assert score_as('modern', 'gsm8k', records)[0] == pytest.approx(sum(m for _, m, _ in says) / 5)
    assert score_as('leaderboard-2023', 'gsm8k', records)[0] == pytest.approx(2 / 5)


def test_the_2023_text_is_what_its_stops_would_have_given(model, tok, base):
    "One run with today's stops, cut afterwards, is the run with the stops of 2023."
    requests = requests_of('gsm8k', 5)
    colon = lambda r, until: Instance('generate_until', r.doc, (r.args[0], dict(r.args[1], until=until)), r.idx)
    word = tok.decode([int(torch.argmax(model(torch.tensor([tok.encode(requests[0].args[0])])).logits[0, -1]))])
    lm = SharedPrefixLM(model, RequestEncoder(tok))
    long, short = (
        lm.generate_until([colon(r, until) for r in requests])
        for until in (['Question:'], [':', 'Question:', 'Question', word])
    )
    for stop in (':', 'Question:', 'Question', word):
        long = [t.split(stop)[0] for t in long]
    assert long == short and short[0] == ''


def test_a_change_of_protocol_runs_only_what_it_must(tmp_path):
    p = load_profile('smoke')
    then = p.model_copy(update=dict(eval=p.eval.model_copy(update=dict(protocol='leaderboard-2023'))))
    assert build_graph(then) == build_graph(p)
    external = lambda x: x.model_copy(
        update=dict(base=x.base.model_copy(update=dict(source='any/llama', revision='abc')))
    )
    again = {n for n, s in build_graph(external(then)).items() if s != build_graph(external(p))[n]}
    # a tokenizer that adds a BOS: all prompts change, no training does
    assert again == {n for n in build_graph(p) if n.startswith(('eval/', 'quantization/'))}
    exp, other = Experiment(p, store=tmp_path), Experiment(then, store=tmp_path)
    a = exp.scores(['base'])
    exp.store.build = None  # nothing may be built from here on
    other.store.build = None
    b = other.scores(['base'])
    both = other.protocols(['base']).set_index('task')
    assert list(a[a.task == 'mmlu'].score) == [both.loc['mmlu', 'modern']] and list(b[b.task == 'mmlu'].score) == [
        both.loc['mmlu', 'leaderboard-2023']
    ]
    assert set(both.columns) == {'model', *PROTOCOLS}


# ---- the benchmark -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def bench():
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / 'benchmarks' / 'h6.py'))


def compared(bench, **options):
    threads = torch.get_num_threads()
    try:
        return bench['compare'](
            argparse.Namespace(
                **dict(
                    items=2,
                    mmlu_items=4,
                    profile=None,
                    leaderboard_shots=False,
                    hf_batch=[1],
                    hf_packed=False,
                    batch=8,
                    generate=6,
                    shape='smoke',
                    device='cpu',
                    dtype='float32',
                    threads=1,
                    load=0.0,
                )
                | options
            )
        )
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def test_the_benchmark_asks_a_profiles_base_its_own_items(bench, full, monkeypatch):
    monkeypatch.setenv('SOLAR_STORE', str(full))
    r = compared(bench, profile='smoke', tasks=['arc', 'truthfulqa', 'gsm8k'])
    assert [(l['items'], l['shots']) for l in r['tasks']] == [(2, 4), (2, 0), (2, 2)] and all(
        l['equal'] == l['requests'] and l['max_difference_nats'] < CLOSE for l in r['tasks']
    )
    assert 'the base of profile smoke (smoke test)' in bench['page'](r, 'x') and 'random' not in bench['page'](r, 'x')


def test_the_benchmark_compares_the_same_answers(bench):
    r = compared(bench, tasks=['arc', 'mmlu', 'gsm8k'])
    arc, mmlu, gsm8k = r['tasks']
    assert (
        arc['equal'] == arc['requests'] == 8
        and gsm8k['equal'] == gsm8k['requests'] == 2
        and arc['max_difference_nats'] < CLOSE
    )
    assert arc['ours_tok'] < arc['hf_tok'] / 2 and arc['ours_logits'] < arc['hf_logits'] / 20
    assert all(l['hf_share'] > 0 and l['ours_share'] > 0 for l in r['tasks'])
    assert r['ratio'] == pytest.approx(sum(l['hf_s'] for l in r['tasks']) / sum(l['ours_s'] for l in r['tasks']))
    assert mmlu['equal'] == mmlu['requests'] == 16
    whole = lambda k: (1172 * arc[k] + 1319 * gsm8k[k]) / 2 + 14042 * mmlu[k] / 4
    assert r['ratio_test_sets'] == pytest.approx(whole('hf_s') / whole('ours_s'))
    assert r['no_guesses']['ratio_test_sets'] == pytest.approx(whole('hf_s') / whole('no_guesses_s'))
    assert gsm8k['hf_passes'] >= gsm8k['no_guesses_passes'] and "smoke's shape with random weights" in bench['show'](r)
    # three tasks of six
    assert (
        '26 of 26 greedy flags' in bench['page'](r, 'x')
        and 'is not reached' in bench['page'](r, 'x')
        and 'that is asked for' not in bench['page'](r, 'x')
    )
    arc['max_difference_nats'] = 2 * CLOSE
    assert 'that is asked for' in bench['page'](r, 'x')
