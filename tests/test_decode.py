"""Generation that guesses ahead gives the same tokens as generation that does not; products by oneDNN give the
same scores."""

from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from toy_models import shaped
from transformers import LlamaForCausalLM

from solar_repro.stages.sources import TinyWorld
from solar_repro.eval import build_requests
from solar_repro.inference import forward as forward_module, generation as generation_module, lm as lm_module
from solar_repro.inference.lm import RequestEncoder, SharedPrefixLM, stopper
from solar_repro.inference.generation import PromptLookup, chain_batches, generate, width
from solar_repro.inference.prefix_tree import Limits
from solar_repro.inference.forward import n_shared, packed
from solar_repro.models.adapters import AdaptedModel, materialize
from solar_repro.models.loading import load_tokenizer, quiet
from solar_repro.paper import H6_TASKS
from solar_repro.tiny.world import shipped_base

ROOM = Limits(256, 256, 8, 4096, 64)
SHOTS = dict(arc=3, hellaswag=1, mmlu=3, truthfulqa=1, winogrande=2, gsm8k=2)


@pytest.fixture(scope='module')
def tok():
    return load_tokenizer(shipped_base())


@pytest.fixture(scope='module')
def model(tok):
    "Two heads to each key head, and large random weights."
    return shaped(len(tok))


@pytest.fixture(scope='module')
def contexts(tok):
    return [
        tuple(tok.encode(t))
        for t in (
            'the red pot',
            'a box is near the green rope. What is the color of the',
            'the old pot',
            'a',
            'the red box is',
        )
    ]


def sixty_tokens(model, context):
    "What `transformers` generates from a context by itself; it never ends by itself."
    mask = torch.ones(1, len(context), dtype=torch.long)
    made = model.generate(
        torch.tensor([context]), attention_mask=mask, max_new_tokens=60, min_new_tokens=60, do_sample=False
    )
    return made[0, len(context) :].tolist()


@pytest.fixture(scope='module')
def truth(model, contexts):
    return {c: sixty_tokens(model, c) for c in contexts}


def oracle(truth, wrong_at=lambda row, place: False):
    "Guesses that are right but at some places of some rows, and always tried."

    class Oracle(PromptLookup):
        trust = property(lambda self: 15, lambda self, value: None)

        def draft(self):
            row, c = next(
                (i, c)
                for i, c in enumerate(truth)
                if tuple(self.tokens[: len(c)]) == c and self.tokens[len(c) :] == truth[c][: len(self.tokens) - len(c)]
            )
            n = len(self.tokens) - len(c)
            return [t + 1 if wrong_at(row, n + j) else t for j, t in enumerate(truth[c][n : n + 15])]

    return Oracle


def run(model, contexts, n, done=lambda t: False, x=ROOM):
    got = {}
    with torch.inference_mode():
        for b in chain_batches(contexts, n, x):
            got |= {r.spots[0][0]: t for (_, r), t in zip(b.chunks[0], generate(model, b, n, done, x))}
    return [got[i] for i in range(len(contexts))]


def count_passes(monkeypatch):
    passes, one = [], generation_module.decode_pass
    monkeypatch.setattr(
        generation_module,
        'decode_pass',
        lambda m, x, drafts: passes.append((len(drafts), out := one(m, x, drafts))) or out,
    )
    return passes


# ---- guesses -------------------------------------------------------------------------------------------------------


def test_right_guesses_are_all_kept(model, contexts, truth, monkeypatch):
    monkeypatch.setattr(generation_module, 'PromptLookup', oracle(truth))
    passes = count_passes(monkeypatch)
    assert run(model, contexts, 48) == [truth[c][:48] for c in contexts]
    assert len(passes) == 3 and all(len(t) == 16 for _, out in passes for t in out)


@pytest.mark.parametrize(
    'wrong',
    (lambda row, place: True, lambda row, place: place % 3 == row % 3, lambda row, place: row % 2 and place % 7 == 0),
)
def test_wrong_guesses_leave_no_trace(wrong, model, contexts, truth, monkeypatch):
    "Rows of one batch keep different numbers of tokens in each pass."
    monkeypatch.setattr(generation_module, 'PromptLookup', oracle(truth, wrong))
    passes = count_passes(monkeypatch)
    assert run(model, contexts, 48) == [truth[c][:48] for c in contexts]
    assert len(passes) > 3 and any(len({len(t) for t in out}) > 1 for _, out in passes) == (not wrong(0, 1))


def test_nothing_is_generated_past_the_last_token(model, contexts, truth, monkeypatch):
    monkeypatch.setattr(generation_module, 'PromptLookup', oracle(truth))
    for n in (0, 1, 7, 16, 17):
        assert run(model, contexts, n) == [truth[c][:n] for c in contexts]


def test_a_stop_string_amid_right_guesses_ends_the_text_there(tok, model, contexts, truth, monkeypatch):
    monkeypatch.setattr(generation_module, 'PromptLookup', oracle(truth))
    passes = count_passes(monkeypatch)
    stop = [tok.decode([truth[c][k]]).strip() for c, k in zip(contexts, (4, 21, 9))]
    assert all(stop)
    done = stopper(tok, stop, {truth[contexts[3]][12]})

    def cut(ids):
        return ids[: next((k for k in range(1, len(ids) + 1) if done(ids[:k])), len(ids))]

    expected = [cut(truth[c][:48]) for c in contexts]
    assert len({len(t) for t in expected}) >= 3 and min(map(len, expected)) <= 5
    assert run(model, contexts, 48, done) == expected
    assert passes[-1][0] < passes[0][0]  # rows that were done early have left


def test_a_row_that_is_done_leaves_room_for_the_drafts_of_others(model, tok, monkeypatch):
    "One row of twelve is done after three passes and stays; the others go on a token a pass, each with a whole draft."
    contexts = [
        tuple(tok.encode(f'the {a} {b}')) for a in ('red', 'old', 'blue', 'green') for b in ('pot', 'box', 'rope')
    ]
    truth = {c: sixty_tokens(model, c) for c in contexts}
    monkeypatch.setattr(generation_module, 'PromptLookup', oracle(truth, lambda row, place: row > 0))
    passes = count_passes(monkeypatch)
    assert run(model, contexts, 32, x=Limits(256, 256, 16, 4096, 64, 10**6)) == [truth[c][:32] for c in contexts]
    assert len(passes) == 32 and all(n == 12 for n, _ in passes)


def test_no_requests_no_passes(tok, model, monkeypatch):
    passes = count_passes(monkeypatch)
    assert (
        SharedPrefixLM(model, RequestEncoder(tok)).generate_until([]) == []
        and chain_batches([], 9, ROOM) == []
        and not passes
    )


def test_guesses_follow_what_was_said_before():
    g = PromptLookup([5, 6, 7, 8, 5, 6])
    assert g.draft() == [7, 8, 5, 6] * 3 + [7, 8, 5]
    g.learn(g.draft(), [9])
    assert g.trust == 0
    g.extend([5, 6])
    assert g.draft()[0] == 9  # the last time counts
    g.extend([7, 8, 5, 6])
    assert g.draft()[0] == 9  # after 8, 5, 6; after 5, 6 alone it was 7
    assert width([0, 0, 0], 0) == width([0, 0, 0], 10**6) == width([15] * 3, 0) == 1 and width([15] * 3, 10**6) == 16


@pytest.mark.parametrize('rows', (1, 4, 64))
def test_texts_of_the_shipped_model_are_the_same_without_guesses(rows, tok, monkeypatch):
    base = materialize(AdaptedModel(shipped_base()))
    requests = [r for t in build_requests('gsm8k', TinyWorld().items('gsm8k', 12)[0], 2).tasks for r in t.instances]
    if rows == 1:
        requests = requests[:4]
    slow, fast = SharedPrefixLM(base, RequestEncoder(tok), rows), SharedPrefixLM(base, RequestEncoder(tok), rows)
    slow.limits = replace(slow.limits, n_idle=0)
    passes = count_passes(monkeypatch)
    texts = slow.generate_until(requests)
    n_slow = len(passes)
    assert all(len(t) == 1 for _, out in passes for t in out)
    assert fast.generate_until(requests) == texts
    assert any(len(t) > 1 for _, out in passes[n_slow:] for t in out) and len(passes) < 2 * n_slow + (rows > 4)
    with quiet():
        assert (
            HFLM(pretrained=base, tokenizer=tok, batch_size=rows).generate_until(requests, disable_tqdm=True) == texts
        )


# ---- attention and products ----------------------------------------------------------------------------------------


def test_heads_that_share_keys_attend_as_before(model, monkeypatch):
    torch.manual_seed(0)
    ids, seen = torch.randint(9, 200, (3, 7)), torch.rand(3, 1, 7, 7) < 0.6
    mask = torch.zeros(3, 1, 7, 7).masked_fill(~(seen | torch.eye(7, dtype=torch.bool)), torch.finfo(torch.float32).min)
    ask = lambda: forward_module.forward(model, ids, torch.arange(21), mask=mask)
    with torch.inference_mode():
        assert n_shared(model) == 2
        ours = ask()
        monkeypatch.setattr(forward_module, 'n_shared', lambda m: 1)
        plain = ask()
    assert torch.allclose(ours, plain, atol=1e-4) and plain.std() > 1
    monkeypatch.undo()
    with pytest.raises(RuntimeError):
        forward_module.forward(model, ids, torch.arange(21), mask=mask[..., :5])
    assert model.config._attn_implementation == 'sdpa'  # also after an error


@pytest.mark.parametrize('task', H6_TASKS)
def test_products_by_onednn_give_the_same_answers(task, tok, model, monkeypatch):
    requests = [r for t in build_requests(task, TinyWorld().items(task, 4)[0], SHOTS[task]).tasks for r in t.instances]
    ask = lambda lm: getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    with quiet():
        theirs = ask(HFLM(pretrained=model, tokenizer=tok, batch_size=8))
    monkeypatch.setattr(forward_module, 'PACK_BYTES', 0)
    used = []
    one = lm_module.packed
    monkeypatch.setattr(
        lm_module, 'packed', lambda m, *block: used.append(len(forward_module._packable(m))) or one(m, *block)
    )
    ours = ask(SharedPrefixLM(model, RequestEncoder(tok)))
    assert used == [2 * 7 + 1]
    if task == 'gsm8k':
        assert ours == theirs
    else:
        for (a, g), (b, h) in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4) and g == h


def test_copies_of_weights_are_gone_afterwards(tok, model, monkeypatch):
    monkeypatch.setattr(forward_module, 'PACK_BYTES', 0)
    before = list(vars(model.lm_head))
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert list(vars(model.lm_head)) == before
    other = LlamaForCausalLM(model.config).eval()
    requests = [Instance('loglikelihood', {}, ('the red', ' pot'), 0)]
    lm = SharedPrefixLM(other, RequestEncoder(tok))
    lm.loglikelihood(requests)
    other.load_state_dict(model.state_dict())  # the next model in the same memory
    assert lm.loglikelihood(requests)[0][0] == pytest.approx(
        SharedPrefixLM(model, RequestEncoder(tok)).loglikelihood(requests)[0][0], abs=1e-4
    )
    monkeypatch.setattr(forward_module, 'PACK_BYTES', 2**27)
    assert forward_module._packable(model) == []  # small models multiply as before
