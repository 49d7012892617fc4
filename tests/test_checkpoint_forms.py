"Checkpoints in the forms that transformers reads: whole or with holes, one model stored or spelled in two ways."
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_inputs import checkpoint, edited, HEAD, NORM, put, refused, weights
from transformers import AutoModelForCausalLM

from solar_repro.models.checkpoints import compare
from solar_repro.models.loading import quiet
from solar_repro.reports.cli import main

LINEAR = 'merge', '--method', 'linear'
EMBEDDING, UP = 'model.embed_tokens.weight', 'model.layers.1.mlp.up_proj.weight'


@pytest.fixture
def pair(tmp_path, monkeypatch):
    for k, n in enumerate('AB'): checkpoint(tmp_path/n, k)
    monkeypatch.chdir(tmp_path)
    return tmp_path/'A', tmp_path/'B'


def config(folder, **change): edited(folder/'config.json', **change)


def logits(folder):
    with quiet(): return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits


# ---- what all inputs lack --------------------------------------------------------------------------------------------
def shards_with_a_hole(folder):
    "The index names the head, and no file holds it."
    t = load_file(folder/'model.safetensors')
    (folder/'model.safetensors').unlink()
    names = sorted(t)
    where = {n: f'model-{1 + (n > EMBEDDING):05}-of-00002.safetensors' for n in names}
    for f in set(where.values()):
        save_file({n: t[n] for n in names if where[n] == f and n != HEAD} or {'x': t[NORM]}, folder/f, {'format': 'pt'})
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))


@pytest.mark.parametrize('change,says', [
    (shards_with_a_hole, ('index.json names lm_head.weight', 'which no file')),
    (lambda f: weights(f, lambda t: t.pop(HEAD)), ('lacks 1 weights', HEAD)),
    (lambda f: weights(f, lambda t: t.pop(UP)), ('lacks 1 weights', UP)),
    (lambda f: config(f, num_hidden_layers=3), ('lacks 9 weights', 'model.layers.2.')),
    (lambda f: config(f, intermediate_size=48), 'transformers does not load'),
], ids=['index', 'head', 'one', 'layer', 'shape'])
def test_a_hole_in_all_inputs_is_not_filled_with_random_numbers(pair, capsys, change, says):
    for folder in pair: change(folder)
    refused(capsys, [*LINEAR, 'A', 'B', 'out'], says)
    assert not (pair[0].parent/'out').exists()


@pytest.mark.parametrize('change', [
    lambda f: (config(f, tie_word_embeddings=True), weights(f, lambda t: t.pop(HEAD))),
    lambda f: (config(f, architectures=['LlamaModel']), weights(f, lambda t: t.pop(HEAD))),
    lambda f: config(f, model_type='of_somebody', num_hidden_layers=3),
    lambda f: weights(f, put('model.layers.0.self_attn.rotary_emb.inv_freq', torch.ones(4))),
], ids=['tied', 'no head', 'not known', 'more'])
def test_a_whole_model_is_merged(pair, change):
    for folder in pair: change(folder)
    assert main([*LINEAR, 'A', 'B', 'out']) == 0
    assert set(load_file('out/model.safetensors')) == set(load_file(pair[0]/'model.safetensors'))


# ---- one function, or two --------------------------------------------------------------------------------------------
def qwen(folder, **said):
    config(folder, model_type='qwen2', architectures=['Qwen2ForCausalLM'], sliding_window=4, max_window_layers=0,
           **said)
    for i in (0, 1):
        for n in 'qkv': weights(folder, put(f'model.layers.{i}.self_attn.{n}_proj.bias', torch.ones(16)))


def test_files_that_differ_in_the_use_of_windows_alone_are_two_functions(pair, capsys):
    for folder, use in zip(pair, (False, True)): qwen(folder, use_sliding_window=use)
    shutil.copy(pair[0]/'model.safetensors', pair[1])
    assert not torch.equal(logits(pair[0]), logits(pair[1]))
    refused(capsys, [*LINEAR, 'A', 'B', 'out'], ('differ in', 'sliding_window (None and 4)'))
    refused(capsys, ['compare', 'A', 'B'], 'sliding_window (None and 4)')


def test_a_window_counts_where_positions_are_scaled_by_it(pair, capsys):
    for folder, n in zip(pair, (4, 8)):
        config(folder, max_position_embeddings=n, rope_scaling=dict(rope_type='dynamic', factor=4.))
    refused(capsys, [*LINEAR, 'A', 'B', 'out'], 'max_position_embeddings (4 and 8)')


@pytest.mark.parametrize('one,other', [
    (dict(rope_scaling=dict(type='linear', factor=2.)), dict(rope_scaling=dict(rope_type='linear', factor=2.))),
    (dict(hidden_act='silu'), dict(hidden_act='swish')),
    (dict(architectures='gone'), {}), (dict(architectures=None), {}),
    (dict(max_position_embeddings=64), dict(max_position_embeddings=128)),
    (dict(transformers_version='4.40.0', torch_dtype='float32'), dict(dtype='float32')),
], ids=['rope', 'swish', 'no architectures', 'null', 'window', 'versions'])
def test_spellings_of_one_function_are_merged(pair, one, other):
    for folder, said in zip(pair, (one, other)): config(folder, **said)
    said = (pair[0]/'config.json').read_text()
    assert main([*LINEAR, 'A', 'B', 'out']) == 0
    kept = json.loads((pair[0].parent/'out'/'config.json').read_text())
    assert kept == json.loads(said)


# ---- one model stored in two ways ------------------------------------------------------------------------------------
def head_twice(folder, same=True):
    config(folder, tie_word_embeddings=True)
    weights(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone() if same else t[HEAD]}))


@pytest.mark.parametrize('swap', [False, True])
def test_what_one_stores_and_the_other_computes_is_left_out(pair, swap):
    for folder in pair: head_twice(folder)
    one, other = pair[::-1] if swap else pair
    weights(one, put('model.layers.0.self_attn.rotary_emb.inv_freq', torch.ones(4)))
    weights(other, lambda t: t.pop(HEAD))
    assert main([*LINEAR, 'A', 'B', 'out']) == 0 and HEAD not in load_file('out/model.safetensors')
    assert HEAD not in set(compare(*pair).tensor)
    want = sum(load_file(f/'model.safetensors')[EMBEDDING].double() for f in pair)/2
    with quiet(): got = AutoModelForCausalLM.from_pretrained('out').state_dict()
    assert torch.equal(got[HEAD], want.float()) and torch.equal(got[EMBEDDING], want.float())


@pytest.mark.parametrize('swap', [False, True])
def test_a_tied_head_stands_for_the_embedding_where_it_alone_is_stored(pair, swap):
    "transformers loads it so; the merge said that each lacks what the other has."
    for folder in pair:
        config(folder, tie_word_embeddings=True)
        weights(folder, lambda t: t.pop(HEAD))
    want = sum(load_file(f/'model.safetensors')[EMBEDDING].double() for f in pair)/2
    weights(pair[swap], lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert main([*LINEAR, 'A', 'B', 'out']) == 0
    assert EMBEDDING in set(compare(*pair).tensor) and HEAD not in load_file('out/model.safetensors')
    with quiet(): got = AutoModelForCausalLM.from_pretrained('out').state_dict()
    assert torch.equal(got[HEAD], want.float()) and torch.equal(got[EMBEDDING], want.float())


@pytest.mark.parametrize('words', [LINEAR, ['merge', *'--method dare_linear --density .5 --base A'.split()]])
def test_what_all_store_twice_is_merged_once(pair, words):
    "DARE would keep other elements of the copy; and what older transformers stored of masks is no weight."
    for folder in pair:
        head_twice(folder)
        weights(folder, put('model.layers.0.attention.masked_bias', torch.tensor(-torch.inf)))
    assert main([*words, 'A', 'B', 'out']) == 0
    assert set(load_file('out/model.safetensors')) == set(load_file('A/model.safetensors')) - {
        HEAD, 'model.layers.0.attention.masked_bias'}
    with quiet(): got = AutoModelForCausalLM.from_pretrained('out').state_dict()
    assert torch.equal(got[HEAD], got[EMBEDDING])


def test_a_head_of_its_own_is_not_left_out(pair, capsys):
    head_twice(pair[0], same=False)
    head_twice(pair[1])
    weights(pair[1], lambda t: t.pop(HEAD))
    refused(capsys, [*LINEAR, 'A', 'B', 'out'], f'lacks {HEAD}')


# ---- dtypes, settings, companions ------------------------------------------------------------------------------------
@pytest.mark.parametrize('swap', [False, True])
@pytest.mark.parametrize('dtype', [torch.int32, torch.float8_e4m3fn])
def test_integers_and_numbers_are_not_mixed_though_a_dtype_is_given(pair, capsys, dtype, swap):
    weights(pair[swap], put(NORM, torch.ones(16).to(dtype)))
    refused(capsys, [*LINEAR, '--dtype', 'float32', 'A', 'B', 'out'], (NORM, 'expected one dtype', 'F32'))


def test_an_equal_tensor_of_eight_bits_is_copied(pair, capsys):
    config(pair[0], architectures=['LlamaModel'])
    config(pair[1], architectures=['LlamaModel'])
    for folder in pair: weights(folder, put('scale', torch.tensor([.5, float('nan')]).to(torch.float8_e4m3fn)))
    assert main([*LINEAR, 'A', 'B', 'out']) == 0
    assert load_file('out/model.safetensors')['scale'].float().tolist()[0] == .5
    weights(pair[1], put('scale', torch.ones(2).to(torch.float8_e4m3fn)))
    refused(capsys, [*LINEAR, 'A', 'B', 'other'], ('F8_E4M3', 'no method mixes'))


@pytest.mark.parametrize('change,says', [
    (dict(quantization_config='x'), 'is quantized (x)'), (dict(quantization_config=[1]), 'is quantized ([1])'),
    (dict(quantization_config=True), 'is quantized (True)'), (dict(model_type=['llama']), "model_type ['llama']"),
    (dict(model_type={}), 'model_type {}'), (dict(architectures=3), 'architectures'), (dict(architectures=[3]), '')])
def test_settings_of_another_type_are_answered(pair, capsys, change, says):
    for folder in pair[1:]: config(folder, **change)
    refused(capsys, [*LINEAR, 'A', 'B', 'out'], says)


def test_an_adapter_beside_the_weights_is_named(pair, capsys):
    (pair[1]/'adapter_config.json').write_text('{}')
    refused(capsys, ['compare', 'A', 'B'], 'B holds an adapter_config.json beside config.json')
    refused(capsys, ['merge', '--method', 'ties', '--base', 'B', 'A', 'out'], 'adapter_config.json')


@pytest.mark.parametrize('name', ['A/config.json', 'a/b/c', 'https:/huggingface.co/org/model', 'A@main'])
def test_only_a_name_of_the_hub_is_to_be_fetched(pair, capsys, name):
    refused(capsys, [*LINEAR, 'A', name, 'out'], 'Correct the path.')
    refused(capsys, [*LINEAR, 'A', 'org/model', 'out'], 'hf download org/model')


def test_names_of_folders_are_no_markup(pair, monkeypatch):
    odd = '<img src=x onerror=alert(1)>'
    pair[1].rename(pair[1].with_name(odd))
    monkeypatch.chdir(pair[0])
    assert main([*LINEAR, '.', f'../{odd}', '../out']) == 0
    card = (pair[0].parent/'out'/'README.md').read_text()
    assert '# linear of A and &lt;img src=x' in card and '| &lt;img src=x' in card and '- A\n' in card


@pytest.mark.parametrize('words', [('a', 'b'), ('b', 'a')])
def test_a_vocabulary_in_a_list_of_words_counts(pair, capsys, words):
    for folder, w in zip(pair, (('a', 'b'), words)):
        (folder/'vocab.txt').write_text('\n'.join(['[UNK]', *w, '']))
        (folder/'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer"}')
    if words == ('a', 'b'): assert main([*LINEAR, 'A', 'B', 'out']) == 0
    else: refused(capsys, [*LINEAR, 'A', 'B', 'out'], "with another id: 'a' (1 and 2)")
