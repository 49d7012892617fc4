"""Text to tokens for all kinds of tokenizer; which files are the model; bases and adapters that are refused."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from solar_repro.core.config import Template
from solar_repro.inference.lm import RequestEncoder, encode_pairs
from solar_repro.models.adapters import AdaptedModel, materialize, read_adapter, save_adapter
from solar_repro.models.base_models import check_base
from solar_repro.models.checkpoints import mapped, open_checkpoint, read_header
from solar_repro.models.files import checkpoint_files
from solar_repro.models.loading import encode, load_tokenizer, quiet, token_ids
from solar_repro.models.resident import Resident
from solar_repro.tiny.base import random_base

WORDS = {w: i for i, w in enumerate(['<bos>', '<eos>', 'Question:', 'is', 'it', 'Answer:', 'yes', 'no'])}
AROUND = {'neither': '$A', 'bos': '<bos> $A', 'eos': '$A <eos>', 'both': '<bos> $A <eos>'}


def tokenizer(around: str) -> PreTrainedTokenizerFast:
    t = Tokenizer(models.WordLevel(WORDS, unk_token='no'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(single=around, special_tokens=[('<bos>', 0), ('<eos>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<bos>', eos_token='<eos>')


@pytest.mark.parametrize('kind', AROUND)
def test_training_and_scoring_read_the_same_tokens(kind):
    "Whatever a tokenizer adds: BOS stays, the EOS behind a prompt goes, and the answer ends with one in training only."
    t, first = tokenizer(AROUND[kind]), [0]*AROUND[kind].startswith('<bos>')
    prompt, template = [*first, 2, 3, 4, 5], Template(prompt='Question: {prompt}\nAnswer:', separator=' ')
    assert encode(t, template, [('is it', 'yes')]) == [(prompt, [6, 1])]
    assert encode(t, template, [('is it', 'yes <eos>')]) == [(prompt, [6, 1])]          # it says so itself
    context = 'Question: is it\nAnswer:'
    assert encode_pairs(RequestEncoder(t), [(context, ' yes'), (context + ' ', 'no')]) == [(prompt, [6]), (prompt, [7])]
    assert encode_pairs(RequestEncoder(t), [('', 'yes')]) == [([0], [6])]               # an empty context is a BOS
    assert RequestEncoder(t).encode([context]) == [prompt]                              # what generation starts from


@pytest.mark.parametrize('kind', AROUND)
def test_no_text_gets_a_second_bos(kind):
    assert token_ids(tokenizer(AROUND[kind]), ['<bos> is it', 'it']) == [[0, 3, 4], [0]*('<bos>' in AROUND[kind]) + [4]]


def test_add_bos_says_otherwise():
    t = tokenizer(AROUND['both'])
    assert RequestEncoder(t, add_bos=False).encode(['is it']) == [[3, 4]]
    assert RequestEncoder(t, add_bos=True).encode(['is it']) == [[0, 3, 4]]
    assert RequestEncoder(t) == RequestEncoder(tokenizer(AROUND['both'])) != RequestEncoder(tokenizer(AROUND['bos']))


# ---- which files are the model ---------------------------------------------------------------------------------------
def random_model(seed: int, vocab_size: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=16, tie_word_embeddings=False,
                                        **shape))


def saved(model, folder, shards: bool = False):
    with quiet(): model.save_pretrained(folder, max_shard_size='8KB' if shards else '1GB')
    return folder


def read_by_us(folder) -> dict[str, torch.Tensor]:
    return {n: mapped(e).view(e.shape) for n, e in open_checkpoint(folder).entries.items()}


def read_by_transformers(folder) -> dict[str, torch.Tensor]:
    with quiet(): return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def stale_index(folder, old):
    "Shards of an older save and their index lie beside a newer file."
    for p in saved(old, folder.parent/'shards', shards=True).glob('model*'): shutil.copy(p, folder)


def stray_weights(folder, old):
    for name in 'a.safetensors', 'model_old.safetensors', 'zzz.safetensors':
        save_file(old.state_dict(), folder/name, metadata=dict(format='pt'))


def pickle_beside(folder, old): torch.save(old.state_dict(), folder/'pytorch_model.bin')


@pytest.mark.parametrize('shards', [False, True], ids=['one file', 'shards'])
@pytest.mark.parametrize('beside', [None, stale_index, stray_weights, pickle_beside], ids=lambda f: f and f.__name__)
def test_we_read_the_weights_that_transformers_loads(beside, shards, tmp_path):
    if beside is stale_index and shards: pytest.skip('an index beside its own shards is not stale')
    new, folder = random_model(1), tmp_path/'model'
    saved(new, folder, shards)
    if beside: beside(folder, random_model(2))
    ours, theirs, expected = read_by_us(folder), read_by_transformers(folder), new.state_dict()
    assert set(ours) == set(theirs) == set(expected)
    for n, w in expected.items(): assert torch.equal(ours[n], w) and torch.equal(theirs[n], w), n
    weights = checkpoint_files(folder).weights
    assert len(weights) > 1 if shards else [p.name for p in weights] == ['model.safetensors']


def test_a_set_of_shards_with_a_hole_is_refused_as_transformers_refuses_it(tmp_path):
    folder = saved(random_model(1), tmp_path/'model', shards=True)
    sorted(folder.glob('model-*.safetensors'))[1].unlink()
    with pytest.raises(OSError): read_by_transformers(folder)
    with pytest.raises(FileNotFoundError, match='model-00002-of'): open_checkpoint(folder)


def test_an_index_that_names_fewer_files_than_there_are_is_refused(tmp_path):
    folder = saved(random_model(1), tmp_path/'model', shards=True)
    index = folder/'model.safetensors.index.json'
    said = json.loads(index.read_text())
    last = max(said['weight_map'].values())
    said['weight_map'] = {n: f for n, f in said['weight_map'].items() if f != last}
    index.write_text(json.dumps(said))
    with pytest.raises(ValueError, match='expected all of those'): open_checkpoint(folder)


def test_pickles_are_found_and_not_read(tmp_path):
    folder = saved(random_model(1), tmp_path/'model')
    pickle_beside(folder, random_model(2))
    (folder/'model.safetensors').unlink()
    assert [p.name for p in checkpoint_files(folder).weights] == ['pytorch_model.bin']
    with pytest.raises(ValueError, match='Convert it once'): open_checkpoint(folder)


@pytest.mark.parametrize('first, second', [([-4, 0], [0, 4]), ([0, 4], [2, 6]), ([4, 0], [4, 8]), ([0, 4], [6, 10])],
                         ids=['negative', 'overlapping', 'backwards', 'past the end'])
def test_offsets_that_cannot_be_are_refused(first, second, tmp_path):
    entries = {n: dict(dtype='F16', shape=[2], data_offsets=o) for n, o in (('a', first), ('b', second))}
    header = json.dumps(entries).encode()
    file = tmp_path/'model.safetensors'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
    with pytest.raises(SafetensorError), safe_open(file, 'pt') as f: f.get_tensor('a'), f.get_tensor('b')
    with pytest.raises(ValueError, match='checkpoint: .*safetensors'): read_header(file)


# ---- bases and adapters that would be taken for others ---------------------------------------------------------------
@pytest.mark.parametrize('name', ['lm_head.weight', 'model.layers.1.mlp.up_proj.weight'])
def test_a_base_that_lacks_weights_is_refused_by_their_names(name, tmp_path):
    base = random_base(tmp_path/'base')
    model = random_model(1, len(load_tokenizer(base)))
    weights = model.state_dict()
    saved(model, base)                                      # its head is not tied; the tokenizer stays
    check_base(base)
    save_file({n: w for n, w in weights.items() if n != name}, base/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=f'lacks 1 weights of its architecture.*{name}'): check_base(base)


def adapter_of(folder, tensors=None, **config):
    "An adapter as PEFT writes it, with what is wrong about it."
    found = {}
    for layer in range(2):
        name = f'base_model.model.model.layers.{layer}.self_attn.q_proj'
        found |= {f'{name}.lora_A.weight': torch.ones(2, 16), f'{name}.lora_B.weight': torch.ones(16, 2)}
    save_adapter(found, 2, 4, folder)
    if tensors: save_file(tensors(found), folder/'adapter_model.safetensors')
    said = LoraConfig(r=2, lora_alpha=4, target_modules=['q_proj'], task_type='CAUSAL_LM').to_dict()
    said = said | dict(peft_type='LORA', target_modules=['q_proj']) | config
    (folder/'adapter_config.json').write_text(json.dumps({k: v for k, v in said.items() if v != 'DROP'}))
    return folder


def test_what_peft_writes_for_plain_lora_is_read(tmp_path):
    adapter = read_adapter(adapter_of(tmp_path))
    assert adapter.scale == 2 and len(adapter.factors) == 2


@pytest.mark.parametrize('key, value', [
    ('init_lora_weights', 'pissa'), ('init_lora_weights', 'olora'), ('init_lora_weights', 'pissa_niter_4'),
    ('layer_replication', [[0, 2], [0, 2]]), ('use_dora', True), ('use_rslora', True), ('bias', 'all'),
    ('lora_bias', True), ('rank_pattern', dict(q_proj=4)), ('modules_to_save', ['lm_head']),
    ('trainable_token_indices', [1]), ('of_next_year', 'something'), ('lora_alpha', 'DROP'), ('r', 0),
    ('peft_type', 'LOHA')])
def test_what_peft_would_honour_on_loading_is_refused_by_name(key, value, tmp_path):
    folder = adapter_of(tmp_path, **{key: value})
    with pytest.raises(ValueError, match='LOHA' if key == 'peft_type' else key): read_adapter(folder)


FIRST = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'

@pytest.mark.parametrize('tensors, said', [
    (lambda t: {n: w for n, w in t.items() if n != FIRST}, 'one of each'),
    (lambda t: {n: torch.empty(0) for n in t}, 'of rank 2'),
    (lambda t: t | {FIRST: torch.ones(3, 16)}, 'of rank 2'),
    (lambda t: t | {FIRST: torch.full((2, 16), math.nan)}, 'finite matrices'),
    (lambda t: t | {'base_model.model.lm_head.weight': torch.ones(2)}, 'A and B matrices only'),
    (lambda t: {}, 'holds no tensors'),
], ids=['half', 'empty tensors', 'another rank', 'nan', 'more than factors', 'nothing'])
def test_damaged_adapters_are_refused(tensors, said, tmp_path):
    with pytest.raises(ValueError, match=said): read_adapter(adapter_of(tmp_path, tensors))


def test_adapters_in_pickles_or_without_weights_are_refused(tmp_path):
    folder = adapter_of(tmp_path)
    (folder/'adapter_model.safetensors').rename(folder/'adapter_model.bin')
    with pytest.raises(FileNotFoundError, match='expected weights in safetensors'): read_adapter(folder)
    (folder/'adapter_config.json').write_text('[')
    with pytest.raises(ValueError, match='no JSON object'): read_adapter(folder)


def test_an_adapter_of_another_base_is_refused_before_it_is_added(tmp_path):
    base, wide = saved(random_model(1), tmp_path/'base'), tmp_path/'wide'
    tensors = {FIRST: torch.ones(2, 32), FIRST.replace('lora_A', 'lora_B'): torch.ones(16, 2)}
    save_adapter(tensors, 2, 2, wide)
    for become in materialize, Resident().become:
        with pytest.raises(ValueError, match='q_proj.*trained on this base'): become(AdaptedModel(base, ((wide, 1.),)))


# ---- bases that are made here ----------------------------------------------------------------------------------------
MAKE_BASE = 'import sys; from solar_repro.tiny.base import random_base; random_base(sys.argv[1])'


def test_a_random_base_is_the_same_bytes_with_and_without_hf_hub_offline(tmp_path):
    "transformers writes into tokenizer_config.json whether it was to read local files only."
    free = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
    ways = dict(offline=free | dict(HF_HUB_OFFLINE='1'),
                free=free | dict(HF_ENDPOINT='http://127.0.0.1:9'))    # who asks the Hub is refused at once
    made = [subprocess.Popen([sys.executable, '-c', MAKE_BASE, str(tmp_path/name)], env=env, stderr=subprocess.PIPE,
                             text=True) for name, env in ways.items()]
    for p in made:
        said = p.communicate()[1]
        assert p.returncode == 0, said[-3000:]
    offline, other = ({p.name: p.read_bytes() for p in (tmp_path/name).iterdir()} for name in ways)
    assert {'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'} <= offline.keys() == other.keys()
    assert [name for name in offline if offline[name] != other[name]] == []
