"Training is deterministic, survives a kill, does not leak, and its parts agree with independent formulas."
import json
import math
import os
import re
import shutil
import signal
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from common import cut, flip
from forked import forked
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import solar_repro.dpo as dpo
import solar_repro.models.training as training
import solar_repro.pipeline.builder as builder
import solar_repro.planning.machine as machine
import solar_repro.sft as sft
from solar_repro.dpo import (
    check_start, dpo_loss, dpo_rows, load_policy, pair_logps, pair_trainer, reference_logps, shared_prefix_length,
    shared_prefix_microbatch, train_dpo)
from solar_repro.models.adapters import AdaptedModel, average, concat_adapter, materialize, read_adapter
from solar_repro.models.loading import load_base, load_tokenizer, quiet
from solar_repro.core.config import load_profile
from solar_repro.core.store import Store
from solar_repro.planning.cost_model import Shape
from solar_repro.stages.graph import build_graph, Stage
from solar_repro.pipeline.experiment import Experiment
from solar_repro.merge import merge_models
from solar_repro.merging.methods import Numbers
from solar_repro.sft import packed_batch, packed_trainer, sft_rows, train_sft
from solar_repro.tiny.base import random_base
from solar_repro.tiny.world import make_world, shipped_base
from solar_repro.tiny.texts import training_rows

smoke = load_profile('smoke')
COMMON = dict(max_length=128, learning_rate=1e-2, save_steps=4, epochs=1, nf4=True, compute_dtype='float32')
SFT = smoke.sft.model_copy(update=dict(COMMON, lora_r=4, lora_alpha=8, lora_dropout=.1, batch_size=2))
DPO = smoke.dpo.model_copy(update=dict(COMMON, batch_size=4, beta=.1))
DIVIDED = dict(max_tokens_per_microbatch=200) # of the packed rows of 128 tokens one a microbatch, of pairs a few
FILES = ('adapter/adapter_model.safetensors', 'adapter/adapter_config.json', 'log.csv')


def math_rows():
    rows = training_rows(make_world(), 'metamath', 40, seed=1)
    return [dict(prompt=r['query'], completion=r['response']) for r in rows]


def belief_pairs():
    return [dict(prompt=r['prompt'], chosen=r['chosen'][-1]['content'], rejected=r['rejected'][-1]['content'])
            for r in training_rows(make_world(), 'ultrafeedback', 40, seed=1)]


def same(a, b):
    for f in FILES: assert (a/f).read_bytes() == (b/f).read_bytes(), f


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    with quiet(): return random_base(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def runs(base, tmp_path_factory):
    "Two SFT runs of different seeds."
    out = tmp_path_factory.mktemp('sft')
    for k in (1, 2): train_sft(base, math_rows(), out/str(k), SFT, smoke.template, seed=k)
    return out


@pytest.fixture(scope='module')
def models(base, runs): return [AdaptedModel(base, ((runs/k/'adapter', 1.),)) for k in '12']


@pytest.fixture(scope='module')
def ref(models): return reference_logps(models[0], belief_pairs(), DPO, smoke.template)


@pytest.fixture(scope='module')
def dpo_run(models, ref, tmp_path_factory):
    out = tmp_path_factory.mktemp('dpo')
    train_dpo(models[0], belief_pairs(), ref, out, DPO, smoke.template, seed=0)
    return out


# a child process trains like the parent, and kills itself with SIGKILL at a given step (never, if that is 0);
# 'clock' saves at every step and divides steps into microbatches
CHILD = '''
import os, signal, sys
from pathlib import Path
import pandas as pd
import test_training as t
what, base, start, ref, out, at, how = *sys.argv[1:6], int(sys.argv[6]), sys.argv[7]
if how == 'clock': t.training.SAVE_S = 0.
settings = dict(sft=t.SFT, dpo=t.DPO)[what].model_copy(update=t.DIVIDED if how == 'clock' else {})
common = dict(out=Path(out), settings=settings, template=t.smoke.template)
def on_progress(done, total):
    if done == at: os.kill(os.getpid(), signal.SIGKILL)
if what == 'sft': t.train_sft(Path(base), t.math_rows(), **common, seed=1, on_progress=on_progress)
else:
    start = t.AdaptedModel(Path(base), ((Path(start), 1.),))
    t.train_dpo(start, t.belief_pairs(), pd.read_pickle(ref), **common, seed=0, on_progress=on_progress)
'''


def child(*args):
    return forked(CHILD, *args, env=dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path])))


@pytest.mark.parametrize('what', ['sft', 'dpo'])
def test_killed_and_resumed_is_bitwise_the_same(what, base, runs, ref, dpo_run, tmp_path):
    whole = dict(sft=runs/'1', dpo=dpo_run)[what]
    args = (what, base, runs/'1'/'adapter', tmp_path/'ref.pkl', tmp_path/'out')
    ref.to_pickle(tmp_path/'ref.pkl')
    assert child(*args, 6, 'steps').returncode == -signal.SIGKILL
    left = tmp_path/'out'/'scratch'
    assert (left/'checkpoint-4'/'complete').exists() and not (tmp_path/'out'/'adapter').exists()
    (left/'checkpoint-6').mkdir()   # as if the kill had struck while this one was being written
    (left/'checkpoint-6'/'trainer_state.json').write_text('{"global_step": 6')
    done = child(*args, 0, 'steps')
    assert done.returncode == 0, done.stderr
    same(whole, tmp_path/'out')


@pytest.mark.parametrize('what', ['sft', pytest.param('dpo', marks=pytest.mark.slow)])
def test_killed_at_several_steps_with_checkpoints_by_the_clock(what, base, runs, models, ref, tmp_path):
    "In microbatches, saved at every step: two more kills, and the run goes on from where each struck."
    ref.to_pickle(tmp_path/'ref.pkl')
    sft, dpo = (x.model_copy(update=DIVIDED) for x in (SFT, DPO))
    if what == 'sft': train_sft(base, math_rows(), tmp_path/'whole', sft, smoke.template, seed=1)
    else: train_dpo(models[0], belief_pairs(), ref, tmp_path/'whole', dpo, smoke.template, seed=0)
    args = (what, base, runs/'1'/'adapter', tmp_path/'ref.pkl', tmp_path/'out')
    for at in (2, 7):
        assert child(*args, at, 'clock').returncode == -signal.SIGKILL
        assert {p.name for p in (tmp_path/'out'/'scratch').glob('checkpoint-*')} == {f"checkpoint-{at-1}"}
    done = child(*args, 0, 'clock')
    assert done.returncode == 0, done.stderr
    same(tmp_path/'whole', tmp_path/'out')


@pytest.mark.parametrize('divided', [{}, DIVIDED], ids=['whole', 'divided'])
def test_a_second_epoch_goes_on_with_the_pairs_that_are_left(models, ref, tmp_path, divided):
    "Stopped at its second step, DPO ends as if it had not been."
    settings = DPO.model_copy(update=divided | dict(epochs=2, save_steps=1))
    half = len(ref)//2
    args = models[0], belief_pairs()[:half], ref[:half]
    def train(out, stop):
        def on_progress(done, total):
            assert total == 2*math.ceil(half/settings.batch_size)
            if done == stop: raise InterruptedError
        train_dpo(*args, out, settings, smoke.template, seed=0, on_progress=on_progress)
    train(tmp_path/'whole', None)
    with pytest.raises(InterruptedError): train(tmp_path/'out', math.ceil(half/settings.batch_size) + 2)
    train(tmp_path/'out', None)
    same(tmp_path/'whole', tmp_path/'out')


# what stands in a checkpoint, whole, and what may happen to one of its files
CHECKPOINT = ('adapter_model.safetensors', 'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'trainer_state.json')


@pytest.fixture(scope='module')
def stopped(base, tmp_path_factory):
    "A folder of the first of `runs`, stopped at step 6: its checkpoint is of step 4."
    out = tmp_path_factory.mktemp('stopped')
    def stop(done, total):
        if done == 6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_sft(base, math_rows(), out, SFT, smoke.template, 1, on_progress=stop)
    assert {*CHECKPOINT, training.SEAL} < {f.name for f in (out/'scratch'/'checkpoint-4').iterdir()}
    return out


@pytest.mark.parametrize('damage', [flip, cut, Path.unlink])
def test_damage_to_any_file_of_a_checkpoint_is_seen(damage, stopped, tmp_path, capsys):
    files = [f.name for f in (stopped/'scratch'/'checkpoint-4').iterdir()]
    for i, name in enumerate(files):
        left = shutil.copytree(stopped/'scratch', tmp_path/str(i))
        assert training.last_checkpoint(left) == left/'checkpoint-4'
        damage(left/'checkpoint-4'/name)
        assert training.last_checkpoint(left) is None
        said, unsealed = capsys.readouterr().err, damage is Path.unlink and name == training.SEAL
        assert [p.name.split('-')[0] for p in left.iterdir()] == ([] if unsealed else ['damaged'])
        assert said.count('\n') == (not unsealed) and ('checkpoint-4 is damaged' in said) != unsealed


@pytest.mark.parametrize('damage, name', [(flip, CHECKPOINT[0]), (cut, CHECKPOINT[1]), (Path.unlink, CHECKPOINT[2])])
def test_a_damaged_checkpoint_changes_no_result(damage, name, base, runs, stopped, tmp_path, capsys):
    "The adapter with a bit flipped, the optimizer's state cut short, the schedule gone: training starts again."
    out = shutil.copytree(stopped, tmp_path/'out')
    damage(out/'scratch'/'checkpoint-4'/name)
    train_sft(base, math_rows(), out, SFT, smoke.template, seed=1)
    assert 'checkpoint-4 is damaged' in capsys.readouterr().err
    same(runs/'1', out)


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    "While a new checkpoint is sealed and the old one removed, the k-th operation is the last one, for every k."
    operations = {'open', 'os.rename', 'os.remove', 'os.rmdir'}
    for k in range(100):
        (scratch := tmp_path/str(k)).mkdir()
        for step in (1, 2):
            (p := scratch/f'checkpoint-{step}').mkdir()
            for name in CHECKPOINT: (p/name).write_text(f'{name} of {step}')
            if step == 1: training.keep_only(p)
        pid = os.fork()
        if pid == 0:
            n = 0
            def count(event, args):
                nonlocal n
                if event in operations:
                    if n == k: os.kill(os.getpid(), signal.SIGKILL)
                    n += 1
            sys.addaudithook(count)
            training.keep_only(p)
            os._exit(0)
        done = os.waitpid(pid, 0)[1] == 0
        found = training.last_checkpoint(scratch)
        step = int(found.name[-1])
        assert all((found/name).read_text() == f'{name} of {step}' for name in CHECKPOINT)
        if done: break
    assert k > 20 and [x.name for x in scratch.iterdir()] == ['checkpoint-2']


def test_same_seed_same_bytes_other_seed_other_adapter(base, runs, tmp_path):
    train_sft(base, math_rows(), tmp_path, SFT, smoke.template, seed=1)
    same(runs/'1', tmp_path)
    assert (runs/'1'/FILES[0]).read_bytes() != (runs/'2'/FILES[0]).read_bytes()


def test_adapters_are_float32_and_hold_no_path(base, runs, dpo_run):
    for folder in (runs/'1', dpo_run):
        tensors = load_file(folder/FILES[0])
        assert tensors and {t.dtype for t in tensors.values()} == {torch.float32}
        assert any((t != t.bfloat16().float()).any() for t in tensors.values())   # never rounded to bfloat16
        assert {p.name for p in (folder/'adapter').iterdir()} == {'adapter_model.safetensors', 'adapter_config.json'}
        assert json.loads((folder/FILES[1]).read_text())['base_model_name_or_path'] is None


def test_training_is_quiet(base, tmp_path, capfd):
    train_sft(base, math_rows()[:8], tmp_path/'sft', SFT, smoke.template, seed=0)
    start, pairs = AdaptedModel(base, ((tmp_path/'sft'/'adapter', 1.),)), belief_pairs()[:8]
    ref = reference_logps(start, pairs, DPO, smoke.template)
    train_dpo(start, pairs, ref, tmp_path/'dpo', DPO, smoke.template, seed=0)
    assert ''.join(capfd.readouterr()) == ''


def _grads_after_a_look(base, guarded):
    "Gradients of a step that follows a forward in eval mode."
    model = load_base(base, nf4=True)
    if not guarded:
        for m in model.modules():
            if hasattr(m, 'support_avx512bf16_for_cpu'): m.support_avx512bf16_for_cpu = True
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad(): model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return model.get_input_embeddings().weight.grad


def test_a_look_in_eval_mode_does_not_spoil_gradients(base):
    ids, model = torch.arange(40).view(2, 20), load_base(base, nf4=True).train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(_grads_after_a_look(base, guarded=True), model.get_input_embeddings().weight.grad)


def test_the_guard_is_needed_here(base):
    "Without the guard the same look changes the gradients: the test above would catch its loss."
    from bitsandbytes.functional import has_avx512bf16
    if not has_avx512bf16(): pytest.skip('this processor has no AVX512-BF16, so bitsandbytes does not repack')
    with pytest.warns(UserWarning, match='autograd kernel was not registered'):
        spoilt = _grads_after_a_look(base, guarded=False)
    good = _grads_after_a_look(base, guarded=True)
    assert (spoilt-good).norm() > .1*good.norm()


def test_packed_batch_has_the_loss_of_its_rows_alone(base):
    data = sft_rows(math_rows(), load_tokenizer(base), smoke.template, 256)
    model = load_base(base, nf4=True).train()

    def total(batch): # summed loss over labelled tokens
        logits = model(**{k: v for k, v in batch.items() if k != 'labels'}, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch['labels'][:, 1:], reduction='sum')

    rows = [data[i] for i in range(7)]
    together = total(packed_batch([packed(rows[:3]), packed(rows[3:5]), packed(rows[5:])]))
    alone = sum(total(packed_batch([packed([r])])) for r in rows)
    assert abs(together-alone) < 1e-3, 'float32 sums of some hundred nats'
    emb = model.get_input_embeddings().weight
    torch.testing.assert_close(*(torch.autograd.grad(x, emb)[0] for x in (together, alone)), rtol=1e-3, atol=1e-4)


def test_the_trainer_does_not_leak_either(base, tmp_path, monkeypatch):
    "Batches hold every row once and whole, and TRL's first loss is that of its rows alone."
    seen = []
    def spy(rows): seen.append(rows); return packed_batch(rows)
    monkeypatch.setattr(sft, 'packed_batch', spy)
    train_sft(base, math_rows(), tmp_path, SFT, smoke.template, seed=0)

    def pieces(rows): # the examples of packed rows
        for row in rows:
            ends = torch.tensor(row['seq_lengths']).cumsum(0).tolist()
            assert ends[-1] == len(row['input_ids']) <= SFT.max_length
            yield from ((row['input_ids'][e-n:e], row['labels'][e-n:e]) for e, n in zip(ends, row['seq_lengths']))
    whole = [r['input_ids'] for r in sft_rows(math_rows(), load_tokenizer(base), smoke.template, SFT.max_length)]
    assert sorted(ids for rows in seen for ids, _ in pieces(rows)) == sorted(whole)

    model, total, n = load_base(base, nf4=True), 0., 0
    for ids, labels in pieces(seen[0]):
        with torch.no_grad(): logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction='sum').item()
        n += sum(label != -100 for label in labels)
    assert abs(pd.read_csv(tmp_path/'log.csv').loss[0]-total/n) < 2e-5   # float32; a leak moves it by some 1e-4


def packed(rows): # examples in one row
    return dict(input_ids=sum((r['input_ids'] for r in rows), []), labels=sum((r['labels'] for r in rows), []),
                seq_lengths=[len(r['input_ids']) for r in rows])


def _gradients(model): return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _close(a, b, share=1e-4):
    "Two gradients: the same but for rounding, and large enough for that to say something."
    assert set(a) == set(b) and len(a) > 10
    norm = sum(x.pow(2).sum() for x in a.values())**.5
    assert norm > 1e-2 and sum((a[n]-b[n]).pow(2).sum() for n in a)**.5 < share*norm


@pytest.fixture
def heads(monkeypatch):
    "How many positions got logits, microbatch by microbatch."
    seen, kernel = [], training.TargetLogps
    class Spy:
        apply = staticmethod(lambda hidden, *rest: seen.append(len(hidden)) or kernel.apply(hidden, *rest))
    monkeypatch.setattr(training, 'TargetLogps', Spy)
    return seen


@pytest.fixture(scope='module')
def packed_rows(base):
    "Five packed rows of one to four examples."
    data = sft_rows(math_rows(), load_tokenizer(base), smoke.template, 128)
    return [packed([data[i] for i in k]) for k in ([0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10, 11])]


def sft_step(base, rows, settings, tmp_path, dtype='float32'):
    "Inputs, loss, accuracy and gradients of a step, of an adapter that is not at zero."
    torch.manual_seed(0)
    tok, lora = load_tokenizer(base), LoraConfig(r=4, target_modules='all-linear', init_lora_weights=False)
    with quiet():
        model = get_peft_model(load_base(base, settings.nf4, dtype), lora)
        saved = training.trainable(model)
        data = sft_rows(math_rows(), tok, smoke.template, 128)
        t = packed_trainer(model, data, tok, settings, tmp_path, 0, 'cpu')
    training.restore(model, saved)
    t.current_gradient_accumulation_steps = 1
    t.create_optimizer()
    if dtype == 'float64': model.double()
    inputs = t.data_collator(rows)
    n = None if 'microbatches' in inputs else (inputs['labels'][:, 1:] != -100).sum()
    loss = t.training_step(model, inputs, n).item()
    return inputs, loss, t._metrics['train']['mean_token_accuracy'], _gradients(model)


@pytest.mark.parametrize('budget, n_microbatches', [(10**6, 1), (300, 4), (1, 5)])
def test_a_step_in_microbatches_is_the_step_in_one(base, packed_rows, tmp_path, heads, budget, n_microbatches):
    "SFT: loss, accuracy and gradient of TRL's own step on the whole batch."
    whole, loss, right, grad = sft_step(base, packed_rows, SFT, tmp_path)
    divided = SFT.model_copy(update=dict(max_tokens_per_microbatch=budget))
    inputs, loss2, right2, grad2 = sft_step(base, packed_rows, divided, tmp_path)
    assert abs(loss-loss2) < 1e-5 and right == pytest.approx(right2)
    _close(grad, grad2)
    assert len(inputs['microbatches']) == n_microbatches == len(heads)
    assert sum(heads) == (whole['labels'][:, 1:] != -100).sum()


@pytest.fixture(scope='module')
def moved_pairs(models, ref):
    "Pairs as tokens, whose reference is not the start: a policy that has moved."
    data = dpo_rows(belief_pairs(), load_tokenizer(models[0].base), smoke.template, DPO.max_length)
    for side in ('chosen', 'rejected'):
        data = data.add_column(f'ref_{side}_logps', (ref[side]+.5*(side == 'chosen')).tolist())
    return data


def dpo_step(start, data, settings, tmp_path, rows=None, dtype='float32'):
    "Inputs, loss, rewards and gradients of a step, on eight pairs."
    rows = [data[i] for i in range(8)] if rows is None else rows
    model = load_policy(start, tmp_path/'start', settings.model_copy(update=dict(compute_dtype=dtype)), 'cpu')
    t = pair_trainer(model, data, load_tokenizer(start.base), settings, tmp_path, 0, 'cpu')
    t.current_gradient_accumulation_steps = 1
    t.create_optimizer()
    if dtype == 'float64': model.double()
    inputs = t.data_collator(rows)
    loss = t.training_step(model, inputs).item()
    rewards = {k: v for k, v in t._metrics['train'].items() if k.startswith('rewards')}
    return inputs, loss, rewards, _gradients(model)


@pytest.mark.parametrize('budget, n_microbatches', [(10**6, 1), (200, 2), (1, 8)])
def test_pairs_with_a_shared_prefix_are_trls_step(models, moved_pairs, tmp_path, heads, budget, n_microbatches):
    "DPO: loss, rewards and gradient of TRL's own step on the whole batch, each prompt computed once."
    batch, loss, rewards, grad = dpo_step(models[0], moved_pairs, DPO, tmp_path)
    heads.clear()
    divided = DPO.model_copy(update=dict(max_tokens_per_microbatch=budget))
    inputs, loss2, rewards2, grad2 = dpo_step(models[0], moved_pairs, divided, tmp_path)
    assert abs(loss-loss2) < 1e-5 and set(rewards) == set(rewards2)
    for k in rewards: assert rewards[k] == pytest.approx(rewards2[k], abs=1e-4)
    _close(grad, grad2)
    assert len(inputs['microbatches']) == n_microbatches == len(heads)
    assert sum(heads) == batch['completion_mask'][:, 1:].sum()
    assert inputs['input_ids'].numel() < batch['input_ids'].numel()
    assert max(shared_prefix_length(moved_pairs[i]) for i in range(8)) < 300


def divided(settings, budget, dtype='float32'):
    "Steps in microbatches, on a base that is not quantized; autocast is on for 'bfloat16'."
    return settings.model_copy(update=dict(max_tokens_per_microbatch=budget, compute_dtype=dtype, nf4=False))


@pytest.fixture
def wide_norms(monkeypatch):
    "Norms in the dtype of the model; transformers rounds them to float32."
    def forward(self, x): return self.weight*x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True)+self.variance_epsilon)
    monkeypatch.setattr(LlamaRMSNorm, 'forward', forward)


# Microbatches of five rows as no sorting by length makes them: groups, their order, and that of rows within.
GROUPINGS = [[[3, 0], [1], [4, 2]], [[2, 4], [1], [0, 3]], [[4], [2], [0], [3], [1]], [[1, 2, 3, 4], [0]]]


@pytest.fixture
def gradient(base, packed_rows, models, moved_pairs, tmp_path, monkeypatch):
    "A function: the gradient of one step on five rows, in given microbatches."
    def of(what, groups, compute_dtype, dtype):
        monkeypatch.setattr(training, 'batches_by_length', lambda length, n_tok: groups)
        settings = divided(dict(sft=SFT, dpo=DPO)[what], 1, compute_dtype)
        if what == 'sft': inputs, *_, grad = sft_step(base, packed_rows, settings, tmp_path, dtype)
        else:
            rows = [moved_pairs[i] for i in range(5)]
            inputs, *_, grad = dpo_step(models[0], moved_pairs, settings, tmp_path, rows, dtype)
        assert [len(m['inputs']['input_ids']) for m in inputs['microbatches']] == [len(g) for g in groups]
        return grad
    return of


@pytest.mark.parametrize('autocast', ['float32', 'bfloat16'])
@pytest.mark.parametrize('what', ['sft', 'dpo'])
def test_one_step_one_gradient(what, gradient, wide_norms, autocast):
    "Of rows in any microbatches and order, to float64's rounding: autocast leaves float64 alone, and is on or off."
    at_once = gradient(what, [[0, 1, 2, 3, 4]], autocast, 'float64')
    assert {x.dtype for x in at_once.values()} == {torch.float64}
    for groups in GROUPINGS: _close(gradient(what, groups, autocast, 'float64'), at_once, 1e-12)


def varlen(q, k, v, first_q, first_k, most_q, most_k, scale, window_size, enable_gqa):
    "What torch's `varlen_attn` computes, a run at a time: causal, the last query beside the last key."
    assert window_size == (-1, 0) and enable_gqa and q.dtype == k.dtype == v.dtype
    bounds, out = zip(first_q, first_q[1:], first_k, first_k[1:]), []
    for a, b, c, d in bounds:
        n, m = int(b - a), int(d - c)
        assert 0 < n <= most_q and n <= m <= most_k
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        done = torch.nn.functional.scaled_dot_product_attention(*parts, seen, scale=scale, enable_gqa=True)
        out.append(done[0].transpose(0, 1))
    assert b == len(q) and d == len(k) == len(v)
    return torch.cat(out)


@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('what', ['sft', 'dpo'])
def test_attention_in_runs_is_attention_under_the_mask(what, again, base, packed_rows, models, moved_pairs, tmp_path,
                                                       wide_norms, monkeypatch):
    "Loss and gradient to float64's rounding, activations kept or computed again; a run has seen no mask."
    called, settings = [], divided(dict(sft=SFT, dpo=DPO)[what], 10**6)

    def can_run(base, it_can):                             # asked before every forward pass
        if again:
            base.gradient_checkpointing_enable(dict(use_reentrant=False))
            base.enable_input_require_grads()
        return it_can

    def step(it_can):
        monkeypatch.setattr(training, 'can_run', lambda base: can_run(base, it_can))
        if what == 'sft': return sft_step(base, packed_rows, settings, tmp_path, 'float64')
        return dpo_step(models[0], moved_pairs, settings, tmp_path, None, 'float64')
    _, loss, _, grad = step(False)
    monkeypatch.setattr(training, 'varlen_attn', lambda *a, **k: called.append(k) or varlen(*a, **k))
    inputs, loss2, _, grad2 = step(True)
    (runs,) = (m['runs'] for m in inputs['microbatches'])
    n_layers = json.loads((base/'config.json').read_text())['num_hidden_layers']
    assert len(called) == n_layers*(1 + again), 'every layer, and again in the backward pass'
    assert (runs['keys'] is None) == (what == 'sft') and loss2 == pytest.approx(loss, abs=1e-12)
    _close(grad2, grad, 1e-11)


def test_what_attention_in_runs_cannot_do_is_refused(base):
    "A model that has been trained so says what it needs, where it is asked for something else."
    model = get_peft_model(load_base(base, False, 'float32'), LoraConfig(r=4, target_modules='all-linear'))
    model.get_base_model().set_attn_implementation(training.IN_RUNS)
    with pytest.raises(ValueError, match='was given no runs.*Load the model again'): model(torch.tensor([[1, 2]]))
    x, runs = torch.zeros(1, 2, 3, 4), training.runs_of([[(3, 0)]], 3)
    for odd, said in ((dict(dropout=.1), 'dropout'), (dict(softcap=9.), 'softcap')):
        with pytest.raises(ValueError, match=f'was given {said}'):
            training.attend_in_runs(None, x, x, x, None, runs=runs, **odd)
    with pytest.raises(ValueError, match='was given a mask'):
        training.attend_in_runs(None, x, x, x, torch.ones(1, 1, 3, 3), runs=runs)


@pytest.mark.parametrize('change, can', [
    ({}, True), (dict(capability=(7, 5)), False), (dict(dtype=torch.float32), False),
    (dict(dtype=torch.float32, autocast=True), True), (dict(sliding_window=9), False),
    (dict(attention_dropout=.1), False), (dict(head_dim=288), False), (dict(head_dim=100), False),
    (dict(v_head_dim=128), False), (dict(backend=False), False)])
def test_runs_are_for_cards_that_have_the_kernel(change, can, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d: change.get('capability', (8, 0)))
    config = dict(num_attention_heads=32, hidden_size=4096, attention_dropout=0., sliding_window=None) | change
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: change.get('autocast', False))
    config = SimpleNamespace(**config)
    config.get_text_config = lambda: config
    base = SimpleNamespace(device=torch.device('cuda', 0), dtype=change.get('dtype', torch.float16), config=config,
                           _supports_attention_backend=change.get('backend', True))
    assert training.can_run(base) is can
    base.device = torch.device('cpu')
    assert not training.can_run(base)


@pytest.mark.parametrize('what', ['sft', 'dpo'])
def test_a_mean_of_means_is_another_gradient(what, gradient):
    "The mistake that the test above is for: the mean of each microbatch, and then the mean of these."
    at_once = gradient(what, [[0, 1, 2, 3, 4]], 'float32', 'float32')
    means = [gradient(what, [g], 'float32', 'float32') for g in GROUPINGS[0]]
    mean_of_means = {n: sum(m[n] for m in means)/len(means) for n in at_once}
    with pytest.raises(AssertionError): _close(mean_of_means, at_once, .01)


@pytest.mark.parametrize('what', ['sft', 'dpo'])
def test_bfloat16_runs_under_autocast(what, gradient, monkeypatch):
    "Adapters compute in bfloat16, and the gradient is that of the rows at once, to its rounding."
    seen, forward = [], torch.nn.Linear.forward
    def spy(self, x):
        out = forward(self, x)
        if self.weight.requires_grad: seen.append((torch.is_autocast_enabled('cpu'), out.dtype))
        return out
    monkeypatch.setattr(torch.nn.Linear, 'forward', spy)
    at_once = gradient(what, [[0, 1, 2, 3, 4]], 'bfloat16', 'bfloat16')
    for groups in GROUPINGS[:2]:
        _close(gradient(what, groups, 'bfloat16', 'bfloat16'), at_once, 8*torch.finfo(torch.bfloat16).eps)
    assert len(seen) > 20 and set(seen) == {(True, torch.bfloat16)}


def test_calibrating_times_the_steps_that_a100_trains_by(monkeypatch):
    "In four bits, bfloat16 under autocast and a budget of tokens: by the trainer's own microbatches."
    p, seen, sums = load_profile('a100'), [], sft.PackedTrainer.sums
    small = dict(lora_r=4, batch_size=4, max_length=64, max_tokens_per_microbatch=64)
    p = p.model_copy(update=dict(sft=p.sft.model_copy(update=small),
                                 machine=p.machine.model_copy(update=dict(device='cpu', threads=1))))
    def spy(self, model, batch):
        in_four_bits = sum(isinstance(m, Linear4bit) for m in model.modules())
        seen.append((torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu'), in_four_bits))
        return sums(self, model, batch)
    monkeypatch.setattr(sft.PackedTrainer, 'sums', spy)
    threads = torch.get_num_threads()
    try: found = machine.calibrate(p, Shape(64, 128, 2, 4, 32, 99, False), budget_s=0.)
    finally: torch.set_num_threads(threads)
    assert len(seen) >= 3 and set(seen) == {(torch.bfloat16, 2*7)}
    assert found.tflops > 0 and re.fullmatch('measured: [0-9]+ steps of 2 layers, 64 tokens each', found.source)


@pytest.mark.parametrize('what', ['sft', 'dpo'])
def test_one_device_however_many_there_are(what, base, packed_rows, models, moved_pairs, tmp_path, monkeypatch):
    "Four GPUs neither multiply the batch nor wrap the model."
    module, name = dict(sft=(sft, 'SFTConfig'), dpo=(dpo, 'DPOConfig'))[what]
    class Crowd(getattr(module, name)):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4 if self.device else 0
    monkeypatch.setattr(module, name, Crowd)
    built, train = [], module.on_one_device
    monkeypatch.setattr(module, 'on_one_device', lambda args: built.append(args) or train(args))
    if what == 'sft': sft_step(base, packed_rows, SFT, tmp_path)
    else: dpo_step(models[0], moved_pairs, DPO, tmp_path)
    assert built[0].n_gpu == 1 and built[0].train_batch_size == dict(sft=SFT, dpo=DPO)[what].batch_size


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "On the tiny base, whose weights say something: two adapters, pairs, and a function that checks a start."
    start, out, pairs = shipped_base(), tmp_path_factory.mktemp('real'), belief_pairs()
    rough = SFT.model_copy(update=dict(learning_rate=1e-2))
    for k, rows in ((1, math_rows()), (2, [dict(prompt=p['prompt'], completion=p['chosen']) for p in pairs])):
        train_sft(start, rows, out/str(k), rough, smoke.template, seed=k)
    tuned = [AdaptedModel(start, ((out/str(k)/'adapter', 1.),)) for k in (1, 2)]
    tok = load_tokenizer(start)

    def check(reference, rows=pairs, dtype='bfloat16', **other):
        settings = DPO.model_copy(update=dict(DIVIDED, compute_dtype=dtype, batch_size=len(pairs)))
        ref = reference_logps(reference, rows, settings.model_copy(update=other), smoke.template)
        data = dpo_rows(pairs, tok, smoke.template, DPO.max_length)
        for side in ('chosen', 'rejected'): data = data.add_column(f'ref_{side}_logps', ref[side].tolist())
        policy = load_policy(tuned[0], out/'policy', settings, 'cpu')
        return check_start(pair_trainer(policy, data, tok, settings, out/'x', 0, 'cpu'), dtype)
    return tuned, pairs, check


@pytest.mark.slow
def test_a_start_in_bfloat16_passes_however_pairs_are_grouped(real):
    (start, _), _, check = real
    for grouping in (1, 10**5, None):
        assert abs(check(start, max_tokens_per_microbatch=grouping)-math.log(2)) < .02


@pytest.mark.slow
def test_the_check_of_a_start_sees_what_it_is_for(real):
    "Another adapter, rows off by one, NF4 against none, bfloat16 for a policy in float32; in bfloat16, too."
    (start, other), pairs, check = real
    with pytest.raises(ValueError, match='another'): check(other)
    with pytest.raises(ValueError, match='other rows'): check(start, rows=pairs[1:]+pairs[:1])
    with pytest.raises(ValueError, match='numerical'): check(start, nf4=False)
    with pytest.raises(ValueError, match='numerical'): check(start, dtype='float32', compute_dtype='bfloat16')


@pytest.mark.slow
def test_a_wider_reference_hides_in_the_rounding_of_the_policy(real):
    "What the check cannot see, as 03_dpo says: numbers of float32 or float16 for a policy in bfloat16."
    (start, _), _, check = real
    for dtype in ('float32', 'float16'): assert abs(check(start, compute_dtype=dtype)-math.log(2)) < .02


@pytest.mark.parametrize('kind', ['sft', 'ref', 'dpo', 'quantization', 'eval'])
def test_loading_for_training_lets_go_of_the_model_in_memory(kind, base, tmp_path, monkeypatch):
    "A card need not hold the evaluated model beside the one that is trained; an evaluation keeps it."
    made = builder.Builder(smoke.machine, Store(tmp_path/'store'))
    model, alive = weakref.ref(made.materialized(AdaptedModel(base))), []
    def write(out, settings, inputs, context):
        alive.append(model() is not None)
        (out/'x').write_text('')
    monkeypatch.setitem(builder.BUILDERS, kind, write)
    made.build(Stage('toy', kind, {}, {}), 'key', {}, None)
    assert alive == [kind == 'eval']


def test_answers_of_a_pair_do_not_see_each_other(models, tmp_path):
    "Other tokens in the chosen answer move the rejected one's log-probability by no bit; in the prompt, they do."
    row = dpo_rows(belief_pairs(), load_tokenizer(models[0].base), smoke.template, DPO.max_length)[0]
    model = load_policy(models[0], tmp_path, DPO, 'cpu')
    say = lambda r: pair_logps(model, shared_prefix_microbatch([r, row]), 'float32')
    other = lambda k: {**row, k: [(t+1) % 500 for t in row[k]]}
    a, b, c = say(row), say(other('chosen_ids')), say(other('prompt_ids'))
    assert torch.equal(a[0, 1], b[0, 1]) and a[0, 0] != b[0, 0] and a[0, 1] != c[0, 1]


def test_a_base_that_bends_its_logits_is_refused(models, tmp_path):
    row = dpo_rows(belief_pairs(), load_tokenizer(models[0].base), smoke.template, DPO.max_length)[0]
    model = load_policy(models[0], tmp_path, DPO, 'cpu')
    model.get_base_model().config.final_logit_softcapping = 30.
    with pytest.raises(ValueError, match='final_logit_softcapping.*Leave max_tokens_per_microbatch out'):
        pair_logps(model, shared_prefix_microbatch([row]), 'float32')


def test_what_is_not_set_stands_in_no_key():
    "A budget of tokens enters the keys of what it changes, the reference among them, and only when it is set."
    def of(**k):
        parts = dict(sft=smoke.sft.model_copy(update=k), dpo=smoke.dpo.model_copy(update=k))
        return build_graph(smoke.model_copy(update=parts))
    plain, divided = of(), of(max_tokens_per_microbatch=512)
    assert 'max_tokens_per_microbatch' not in json.dumps([s.settings for s in plain.values()])
    changed = {s.kind for n, s in divided.items() if s.settings != plain[n].settings}
    assert changed == {'sft', 'ref', 'dpo', 'quantization'}
    with pytest.raises(ValueError, match='not both'):
        type(SFT).model_validate({**SFT.model_dump(), 'microbatches': 2, 'max_tokens_per_microbatch': 512})


def test_average_of_models_is_average_of_weights(models):
    mean = average(models, [.3, .7])
    W, parts = materialize(mean).state_dict(), [materialize(p).state_dict() for p in models]
    assert max((parts[0][n]-parts[1][n]).abs().max() for n in W) > 1e-2
    for n in W: torch.testing.assert_close(W[n], .3*parts[0][n]+.7*parts[1][n], rtol=0, atol=1e-6)


def test_concat_adapter_is_the_model(models, tmp_path):
    mean = average(models, [.3, .7])
    one = AdaptedModel(mean.base, ((concat_adapter(mean, tmp_path), 1.),))
    assert next(iter(read_adapter(tmp_path).factors.values()))[0].shape[0] == 2*SFT.lora_r
    W, V = materialize(mean).state_dict(), materialize(one).state_dict()
    for n in W: torch.testing.assert_close(W[n], V[n], rtol=0, atol=1e-6)


def test_the_adapter_is_the_trained_model(base, runs, models):
    "On an unquantised base, PEFT with the adapter says what the materialised model says."
    ids = torch.arange(60).view(3, 20)
    with quiet(), torch.no_grad():
        a = PeftModel.from_pretrained(load_base(base), runs/'1'/'adapter').eval()(input_ids=ids).logits
        b = materialize(models[0])(input_ids=ids).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_trl_computes_our_dpo_loss(models, ref, dpo_run, tmp_path):
    "TRL's loss of a policy that has moved, against the formula, and its start against ln 2."
    tok = load_tokenizer(models[0].base)
    data = dpo_rows(belief_pairs(), tok, smoke.template, DPO.max_length)
    for side in ('chosen', 'rejected'): data = data.add_column(f'ref_{side}_logps', ref[side].tolist())

    def trainer(start):
        return pair_trainer(load_policy(start, tmp_path/'start', DPO, 'cpu'), data, tok, DPO, tmp_path, 0, 'cpu')
    for start, moved in ((models[0], False), (AdaptedModel(models[0].base, ((dpo_run/'adapter', 1.),)), True)):
        t = trainer(start)
        batch = t.data_collator([data[i] for i in range(8)])
        policy = pair_logps(t.model, batch, 'float32')
        r = torch.stack([batch['ref_chosen_logps'], batch['ref_rejected_logps']], 1)
        ours = dpo_loss(*policy.T, *r.T, DPO.beta).item()
        assert abs(t.compute_loss(t.model.train(), dict(batch)).item()-ours) < 1e-5
        assert (abs(ours-math.log(2)) > 1e-3) == moved
        if moved:
            with pytest.raises(ValueError, match='ln 2'): check_start(t, 'float32')
        else: check_start(t, 'float32')
        assert list(t.model.peft_config) == ['default'] and t.ref_model is None   # one adapter, no second model


def test_dpo_starts_at_ln_2_and_learns(dpo_run):
    log = pd.read_csv(dpo_run/'log.csv')
    assert abs(log.loss[0]-math.log(2)) < 1e-5 and log['rewards/margins'].iloc[-5:].mean() > .02
    assert list(log) == ['step', 'loss', 'learning_rate', 'rewards/chosen', 'rewards/rejected', 'rewards/margins',
                         'rewards/accuracies']


def test_stepwise_continues_from_the_step_before(models, dpo_run, tmp_path):
    "A second step starts at the first one's adapter and has it as its reference."
    first, pairs = AdaptedModel(models[0].base, ((dpo_run/'adapter', 1.),)), belief_pairs()[20:]
    train_dpo(first, pairs, reference_logps(first, pairs, DPO, smoke.template), tmp_path, DPO, smoke.template, seed=0)
    assert abs(pd.read_csv(tmp_path/'log.csv').loss[0]-math.log(2)) < 1e-5


@pytest.mark.parametrize('nf4, dtype', [(False, 'float32'), (True, 'bfloat16')])
def test_other_numerical_settings(base, tmp_path, nf4, dtype):
    other = dict(nf4=nf4, compute_dtype=dtype)
    sft, dpo, pairs = SFT.model_copy(update=other), DPO.model_copy(update=other), belief_pairs()[:12]
    train_sft(base, math_rows()[:12], tmp_path/'sft', sft, smoke.template, seed=0)
    start = AdaptedModel(base, ((tmp_path/'sft'/'adapter', 1.),))
    ref = reference_logps(start, pairs, dpo, smoke.template)
    train_dpo(start, pairs, ref, tmp_path/'dpo', dpo, smoke.template, seed=0)
    assert {t.dtype for t in load_file(tmp_path/'dpo'/FILES[0]).values()} == {torch.float32}
    if nf4: # numbers of another arithmetic do not pass for these
        ref = reference_logps(start, pairs, DPO.model_copy(update=dict(nf4=False)), smoke.template)+1.5
        with pytest.raises(ValueError, match='reference_logps'):
            train_dpo(start, pairs, ref, tmp_path/'x', dpo, smoke.template, seed=0)


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path):
    wild = SFT.model_copy(update=dict(learning_rate=1e30, max_grad_norm=0.))
    with pytest.raises(FloatingPointError, match='learning_rate'):
        train_sft(base, math_rows(), tmp_path, wild, smoke.template, seed=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_slerp_of_a_sharded_base(models, dtype, tmp_path):
    "t = 0 and 1 give the ends bit for bit, in any dtype, from several weight files."
    from transformers import AutoModelForCausalLM
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(models[0].base, dtype=dtype)
        whole.save_pretrained(tmp_path/'base', max_shard_size='200KB')
        load_tokenizer(models[0].base).save_pretrained(tmp_path/'base')
    assert len(list((tmp_path/'base').glob('model-*.safetensors'))) > 1
    a, b = (AdaptedModel(tmp_path/'base', p.adapters) for p in models)
    for t, end in ((0., a), (1., b)):
        table = merge_models([a, b], 'slerp', Numbers(t=t), tmp_path/str(t))
        W, V = materialize(AdaptedModel(tmp_path/str(t))).state_dict(), materialize(end).state_dict()
        assert len(W) > 10 and all(torch.equal(W[n], V[n]) and W[n].dtype == dtype for n in W)
    same_in_both = table.tensor.str.contains('norm|embed')
    assert table.fell_back[same_in_both].all() and (table.cosine[same_in_both] > .999999).all()


MOVED = '''
import os, signal, sys
from solar_repro.models import training as train
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.progress import Progress
train.SAVE_S, on_progress = 0., Progress.on_progress
def killed(self, name, done, total):
    on_progress(self, name, done, total)
    if name == sys.argv[2] and done == 2: os.kill(os.getpid(), signal.SIGKILL)
Progress.on_progress = killed
Experiment('smoke', store=sys.argv[1]).run(['DPO v1'])
'''


@pytest.mark.parametrize('stage', [pytest.param('SFT v3', marks=pytest.mark.slow), 'DPO v1'])
def test_a_run_goes_on_from_a_copy_of_its_store(stage, tmp_path, capfd, full, monkeypatch):
    "Killed in a training, its store moved: it resumes inside the stage and ends with the same bits."
    first = forked(MOVED, tmp_path/'old', stage)
    assert first.returncode == -signal.SIGKILL, first.stderr
    shutil.copytree(tmp_path/'old', tmp_path/'new')
    shutil.rmtree(tmp_path/'old')
    resumed, look = [], training.last_checkpoint
    def spy(scratch): resumed.append(found := look(scratch)); return found
    monkeypatch.setattr(training, 'last_checkpoint', spy)
    exp = Experiment('smoke', store=tmp_path/'new')
    exp.run(['DPO v1'])
    assert resumed[0] is not None and resumed[0].is_relative_to(tmp_path/'new') and all(x is None for x in resumed[1:])
    assert exp.build('DPO v1').content == Experiment('smoke', store=full).build('DPO v1').content


def test_one_step_without_a_rate_is_refused(base, models, tmp_path):
    "The warm-up's first step has a rate of zero; nothing else would be said of it."
    warm, pairs = dict(warmup_ratio=.1, batch_size=64), belief_pairs()[:8]
    with pytest.raises(ValueError, match='all rows make one step.*warmup_ratio = 0'):
        train_sft(base, math_rows()[:2], tmp_path/'sft', SFT.model_copy(update=warm), smoke.template, 0)
    knobs = DPO.model_copy(update=warm)
    reference = reference_logps(models[0], pairs, knobs, smoke.template)
    with pytest.raises(ValueError, match='all rows make one step'):
        train_dpo(models[0], pairs, reference, tmp_path/'dpo', knobs, smoke.template, 0)
    train_sft(base, math_rows()[:2], tmp_path/'cold', SFT.model_copy(update=warm | dict(warmup_ratio=0.)),
              smoke.template, 0)
    assert any(w.any() for n, w in load_file(tmp_path/'cold'/FILES[0]).items() if 'lora_B' in n)
