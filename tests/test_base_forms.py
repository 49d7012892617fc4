"Forms of an external base: what cannot work is refused by the file at fault, what is only spelled otherwise passes."
import json
import shutil

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_models import shaped
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from solar_repro.inference.lm import RequestEncoder, SharedPrefixLM
from solar_repro.merging.export import export
from solar_repro.models.adapters import AdaptedModel, materialize, save_adapter
from solar_repro.models.base_models import check_base, write_base
from solar_repro.models.base_source import base_settings
from solar_repro.models.loading import quiet
from solar_repro.models.resident import Resident
from solar_repro.tiny.base import random_base

NORM, UP = 'model.norm.weight', 'model.layers.1.mlp.up_proj.weight'
EMBEDDING = 'model.embed_tokens.weight'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    with quiet(): return random_base(tmp_path_factory.mktemp('made')/'base')


@pytest.fixture
def base(made, tmp_path):
    return shutil.copytree(made, tmp_path/'base')


def edit(base, file='config.json', **change): # None: the key goes
    said = json.loads((base/file).read_text()) | change
    (base/file).write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def cast(base, dtype, *names): # all, where none is named
    w = load_file(base/'model.safetensors')
    w = {n: x.to(dtype) if n in (names or w) else x for n, x in w.items()}
    save_file(w, base/'model.safetensors', {'format': 'pt'})


@pytest.mark.parametrize('change', [
    dict(quantization_config='x'), dict(quantization_config=[1]), dict(quantization_config=True),
])
def test_quantization_of_any_type_is_refused(base, change):
    edit(base, **change)
    with pytest.raises(ValueError, match='its weights are quantized'): check_base(base)


@pytest.mark.parametrize('change,says', [
    *[(dict(model_type=x), 'model_type') for x in (['llama'], {}, None)],
    (dict(architectures=3), 'architectures'), (dict(architectures=[3]), 'architectures'),
    (dict(rms_norm_eps='x'), 'rms_norm_eps'), (dict(rope_parameters='x'), 'rope_parameters'),
    (dict(num_attention_heads=3), 'heads'), (dict(dtype='float7'), 'float7'),
    (dict(dtype=None, torch_dtype='float7'), 'float7'), (dict(hidden_size='64'), 'hidden_size'),
    (dict(transformers_weights='sub/model.safetensors'), 'sub/model.safetensors'),
], ids=str)
def test_a_configuration_that_is_none_is_named(base, change, says):
    (base/'sub').mkdir()
    shutil.copy(base/'model.safetensors', base/'sub')
    edit(base, **change)
    with pytest.raises(ValueError, match=rf'config\.json .*{says}') as e: check_base(base)
    assert 'tokenizer' not in str(e.value)


def test_a_value_that_must_not_be_null_is_named(base):
    said = json.loads((base/'config.json').read_text()) | dict(max_position_embeddings=None)
    (base/'config.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r'config\.json .*max_position_embeddings'): check_base(base)


@pytest.mark.parametrize('held,stated', [
    ('float32', None), ('float16', 'float16'), ('bfloat16', 'bfloat16'), ('float16', None), ('bfloat16', None),
])
@pytest.mark.parametrize('key', ['dtype', 'torch_dtype'])
def test_files_in_the_dtype_of_the_configuration_pass(base, held, stated, key):
    edit(base, **dict(dtype=None) | {key: stated})
    cast(base, getattr(torch, held))
    check_base(base)
    assert {str(w.dtype) for w in materialize(AdaptedModel(base)).parameters()} == {f'torch.{held}'}


@pytest.mark.parametrize('held,names,stated', [
    ('float16', (), 'float32'), ('float32', (), 'float16'), ('bfloat16', (), 'float16'), ('float16', (UP,), 'float32'),
    ('float32', (NORM,), 'bfloat16'), ('float16', (UP,), None), ('float8_e4m3fn', (UP,), 'float32'),
])
def test_files_in_another_dtype_are_refused_and_the_advice_works(base, tmp_path, held, names, stated):
    edit(base, dtype=stated)
    if names and stated: cast(base, getattr(torch, stated))
    cast(base, getattr(torch, held), *names)
    with pytest.raises(ValueError, match='expected one dtype') as e: check_base(base)
    assert 'save_pretrained' in str(e.value)
    with quiet(): AutoModelForCausalLM.from_pretrained(base, dtype='auto').save_pretrained(tmp_path/'again')
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path/'again')
    check_base(tmp_path/'again')


def test_numbers_in_eight_bits_that_are_none_are_found(base):
    w = load_file(base/'model.safetensors')
    w[UP][0, 0] = float('nan')
    save_file(w | {UP: w[UP].to(torch.float8_e5m2)}, base/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match=f'1 of .* weights of {UP} are not finite'): check_base(base)


@pytest.mark.parametrize('code', [dict(AutoTokenizer=['own.Own', None]), dict(AutoTokenizer=[None, 'org/x--own.Own'])])
def test_code_of_a_tokenizer_is_not_run_nor_asked_for(base, tmp_path, monkeypatch, code):
    monkeypatch.setattr('builtins.input', lambda *a: pytest.fail('asked whether to run code'))
    (base/'own.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nclass Own: pass\n")
    edit(base, 'tokenizer_config.json', auto_map=code, tokenizer_class='Own')
    with pytest.raises(ValueError, match=r'tokenizer_config\.json needs code .*code is not run'): check_base(base)
    assert not (tmp_path/'ran').exists()


def test_an_adapter_beside_the_weights_is_named(base):
    (base/'adapter_config.json').write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match='holds adapter_config.json'): check_base(base)


def test_weights_of_another_name_are_taken_and_those_of_a_folder_within_are_refused(base, tmp_path):
    (base/'model.safetensors').rename(base/'own.safetensors')
    edit(base, transformers_weights='own.safetensors')
    (tmp_path/'out').mkdir()
    write_base(*base_settings(str(base)), tmp_path/'out')
    check_base(tmp_path/'out')
    (base/'sub').mkdir()
    (base/'own.safetensors').rename(base/'sub'/'own.safetensors')
    edit(base, transformers_weights='sub/own.safetensors')
    with pytest.raises(ValueError, match='expected a file beside it'):
        write_base(*base_settings(str(base)), tmp_path/'out')


def test_what_older_versions_stored_of_masks_is_no_weight(base):
    "GPT-NeoX in float16 has a buffer of -1e9 in its file, which that type holds as an infinity."
    mask = {'model.layers.0.attention.masked_bias': torch.tensor(-1e9).half()}
    save_file(load_file(base/'model.safetensors') | mask, base/'model.safetensors', {'format': 'pt'})
    check_base(base)


def test_ids_of_a_tokenizer_may_have_gaps():
    words = {'<eos>': 0, 'the': 1, 'cat': 5, 'sat': 40}
    t = Tokenizer(models.WordLevel(words, unk_token='<eos>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    lm = SharedPrefixLM(shaped(48), RequestEncoder(PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<eos>')))
    (ll, _), = lm.loglikelihood([Instance('loglikelihood', {}, ('the cat', ' sat'), 0)], disable_tqdm=True)
    logits = lm.model(torch.tensor([[1, 5]])).logits[0, -1]
    assert ll == pytest.approx(torch.log_softmax(logits, -1)[40].item(), abs=1e-4)


@pytest.mark.parametrize('stored', [[EMBEDDING], ['lm_head.weight'], [EMBEDDING, 'lm_head.weight']])
def test_a_tied_base_follows_another_under_whatever_name_it_is_stored(stored, tmp_path):
    "A model in memory that becomes another has all its weights."
    torch.manual_seed(0)
    for name in 'AB':
        with quiet(): folder = random_base(tmp_path/name)
        edit(folder, tie_word_embeddings=True)
        w = {n: torch.randn_like(x) for n, x in load_file(folder/'model.safetensors').items() if n != 'lm_head.weight'}
        embedding = w.pop(EMBEDDING)
        save_file(w | {n: embedding.clone() for n in stored}, folder/'model.safetensors', {'format': 'pt'})
    resident = Resident()
    for name in 'AB': got = resident.become(AdaptedModel(tmp_path/name))
    want = materialize(AdaptedModel(tmp_path/'B'))
    assert all(torch.equal(p, q) for p, q in zip(got.parameters(), want.parameters(), strict=True))


def test_a_change_that_the_bases_type_cannot_hold_is_refused(base, tmp_path):
    "An infinity in a checkpoint is found where it is made."
    cast(base, torch.float16)
    edit(base, dtype='float16')
    w = load_file(base/'model.safetensors')[UP]
    key, ones = f'base_model.model.{UP.removesuffix(".weight")}.lora_', torch.ones(1, max(w.shape))
    t = {f'{key}A.weight': ones[:, :w.shape[1]]*1e3, f'{key}B.weight': ones[:, :w.shape[0]].T*1e3}
    model = AdaptedModel(base, ((save_adapter(t, 1, 1, tmp_path/'adapter'), 1.),))
    for write in (materialize, lambda m: export(m, tmp_path/'out')):
        with pytest.raises(ValueError, match='is not finite in torch.float16; expected numbers'): write(model)
    assert not (tmp_path/'out').exists()
