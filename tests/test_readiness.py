"""Bases that would be scored wrong, or stop a run after its trainings, are refused before the first."""
import json
import shutil

import pytest
import torch
import transformers
from test_sources import FILES, WORDS, model_of, profile_of, put, rows_of, tokenizer_of

from solar_repro.pipeline.experiment import Experiment
from solar_repro.planning.readiness import check_askable, check_budget, check_packing

LLAMA = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
FALCON = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2)
NEO = dict(hidden_size=64, num_layers=3, num_heads=2, attention_types=[[['global', 'local', 'local'], 1]])
KINDS = {
    'GPTNeo': ('GPTNeo', NEO), 'Mpt': ('Mpt', dict(d_model=64, n_layers=3, n_heads=2)),
    'Bloom': ('Bloom', dict(hidden_size=64, n_layer=3, n_head=2)),
    'Falcon, alibi': ('Falcon', FALCON | dict(alibi=True)),
    'Roberta': ('Roberta', dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                                is_decoder=True)),
    'Falcon': ('Falcon', FALCON),
    'GPTNeoX': ('GPTNeoX', dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)),
    'OPT': ('OPT', dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, ffn_dim=64,
                        word_embed_proj_dim=64)),
    'Qwen2': ('Qwen2', LLAMA), 'Gemma2': ('Gemma2', LLAMA | dict(head_dim=32, sliding_window=8192)),
    'CTRL': ('CTRL', dict(n_embd=64, n_layer=3, n_head=2, dff=64)),
    'Granite': ('Granite', LLAMA | dict(logits_scaling=4.)), 'Cohere': ('Cohere', LLAMA)}
WRONG = 'GPTNeo', 'Mpt', 'Bloom', 'Falcon, alibi', 'Roberta'


@pytest.fixture(scope='module')
def tokenizer(): return tokenizer_of('byte', False, True)


def base_of(folder, name, tokenizer):
    kind, sizes = KINDS[name]
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = getattr(transformers, f'{kind}Config')(**sizes, **ids)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('name', KINDS)
def test_a_base_that_would_be_scored_wrong_is_refused_and_no_other(tmp_path, name, tokenizer):
    base, state = base_of(tmp_path, name, tokenizer), torch.get_rng_state()
    if name not in WRONG: check_askable(base)
    else:
        with pytest.raises(ValueError, match='cannot be asked with shared prefixes') as e: check_askable(base)
        assert repr(json.loads((base/'config.json').read_text())['model_type']) in str(e.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('name,says', [
    ('Qwen2', ''), ('GPTNeoX', ''), ('Granite', 'logits_scaling'), ('Cohere', 'logit_scale'),
    ('Gemma2', 'final_logit_softcapping'), ('CTRL', '')])
def test_a_budget_of_tokens_needs_plain_logits(tmp_path, name, says, tokenizer):
    base = base_of(tmp_path, name, tokenizer)
    if not says: return check_budget(base)
    with pytest.raises(ValueError, match='max_tokens_per_microbatch') as e: check_budget(base)
    assert says in str(e.value)


@pytest.mark.parametrize('name', ['Qwen2', 'GPTNeoX', 'Gemma2', 'CTRL', 'Falcon', 'OPT'])
def test_packed_examples_need_a_mask_from_positions(tmp_path, name, tokenizer):
    base = base_of(tmp_path, name, tokenizer)
    if name not in ('Falcon', 'OPT'): return check_packing(base)
    with pytest.raises(ValueError, match=f"'{name.lower()}' reads the examples before one"): check_packing(base)


def test_a_tokenizer_without_a_file_of_the_tokenizers_library(tmp_path):
    tokenizer = transformers.ByT5Tokenizer()
    config = transformers.LlamaConfig(vocab_size=384, bos_token_id=None, eos_token_id=1, **LLAMA)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='ByT5Tokenizer is written in Python'): check_askable(tmp_path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('data')
    for name in FILES: put(d, name, rows_of(name, 40))
    return d


def refused(exp, says):
    "Nothing is trained."
    with pytest.raises(ValueError, match=says): exp.run(['own/SFT v1/alpaca_gpt4', 'DPO v1'])
    assert {s.kind for n, s in exp.graph.items() if exp.find(n)} == {'base', 'data'}


def test_no_model_is_trained_for_a_preference_training_that_cannot_be(tmp_path, folder, tokenizer):
    path = profile_of(tmp_path, base_of(tmp_path/'base', 'Granite', tokenizer), folder)
    path.write_text(path.read_text().replace('[eval]', '[eval]\nn_own = 2', 1)
                    .replace('[dpo]', '[dpo]\nmax_tokens_per_microbatch = 2048', 1))
    refused(Experiment(path, store=tmp_path/'store'), 'logits_scaling.*max_tokens_per_microbatch')


def test_no_model_is_trained_for_held_out_rows_that_cannot_be_read(tmp_path, folder):
    data, long = shutil.copytree(folder, tmp_path/'data'), ' '.join(WORDS)*10
    put(data, 'alpaca_gpt4', [dict(instruction=f'{long} {i}' if i % 2 else f'Say {i}', input='',
                                   output=f'yes {i}' if i % 2 else f'{long} {i}') for i in range(40)])
    path = profile_of(tmp_path, model_of(tmp_path/'base', window=512), data)
    path.write_text(path.read_text().replace('[eval]', '[eval]\nn_own = 8', 1)
                    .replace('[sft]', '[sft]\nmax_length = 400', 1))
    refused(Experiment(path, store=tmp_path/'store'), 'longest request of held-out rows.*Lower max_length')


def test_a_base_is_probed_for_evaluations_alone(tmp_path, folder, tokenizer):
    path = profile_of(tmp_path, base_of(tmp_path/'base', 'GPTNeo', tokenizer), folder)
    exp = Experiment(path, store=tmp_path/'store')
    with pytest.raises(ValueError, match="'gpt_neo' cannot be asked"): exp.scores(['base'])
    assert not any(a.kind == 'eval' for a in exp.store.entries())
