"""Bad inputs, each with words of the one line that answers it: what was wrong, where, what was expected, what to do.

No case needs a trained model; the checkpoints are minute. Exit 2 is a mistake of the user's, 3 would be one of ours."""
import json
import math
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from solar_repro.core.data_files import read_custom
from solar_repro.data import BENCHMARKS, FILES
from solar_repro.models.base_models import check_base
from solar_repro.stages.sources import source_of
from solar_repro.reports.cli import main

WIDTH, VOCAB = 16, 40
CONFIG = dict(architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=WIDTH, intermediate_size=2*WIDTH,
              num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCAB, rms_norm_eps=1e-5,
              rope_theta=10000.0, hidden_act='silu', max_position_embeddings=64, tie_word_embeddings=False)


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    def r(*shape): return torch.randn(*shape, generator=g)*.1
    t = {'model.embed_tokens.weight': r(VOCAB, WIDTH), 'model.norm.weight': r(WIDTH), 'lm_head.weight': r(VOCAB, WIDTH)}
    for i in (0, 1):
        p = f'model.layers.{i}.'
        t |= {f'{p}self_attn.{n}_proj.weight': r(WIDTH, WIDTH) for n in 'qkvo'}
        t |= {f'{p}mlp.{n}_proj.weight': r(2*WIDTH, WIDTH) for n in ('gate', 'up')}
        t |= {f'{p}mlp.down_proj.weight': r(WIDTH, 2*WIDTH)}
        t |= {f'{p}{n}_layernorm.weight': r(WIDTH) for n in ('input', 'post_attention')}
    return t


def checkpoint(folder, seed):
    folder.mkdir()
    save_file(tensors(seed), folder/'model.safetensors', {'format': 'pt'})
    (folder/'config.json').write_text(json.dumps(CONFIG))


def adapter(folder, seed):
    g = torch.Generator().manual_seed(seed)
    folder.mkdir()
    names = [f'base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_' for i in (0, 1) for m in 'qv']
    t = {n + k: torch.randn(*s, generator=g) for n in names
         for k, s in (('A.weight', (2, WIDTH)), ('B.weight', (WIDTH, 2)))}
    save_file(t, folder/'adapter_model.safetensors', {'format': 'pt'})
    config = dict(peft_type='LORA', task_type='CAUSAL_LM', r=2, lora_alpha=4, target_modules=['q_proj', 'v_proj'],
                  bias='none', base_model_name_or_path='org/base')
    (folder/'adapter_config.json').write_text(json.dumps(config))


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    d = tmp_path_factory.mktemp('inputs')
    for k, n in enumerate('AB'): checkpoint(d/n, k)
    for k, n in enumerate('PQ'): adapter(d/n, k)
    return d


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    for n in 'ABPQ': shutil.copytree(inputs/n, tmp_path/n)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, argv, says) -> str:
    "The line that answers a command."
    status, err = main(argv), capsys.readouterr().err
    assert status == 2, err
    lines = [x for x in err.splitlines() if x.startswith('solar-repro')]
    assert lines and 'Traceback' not in err and '[Errno' not in err, err
    for word in says if isinstance(says, tuple) else (says,): assert word in err, err
    return err


def edited(file, **change):
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v != 'gone'}))


def weights(folder, change, name='model.safetensors'):
    t = load_file(folder/name)
    change(t)
    save_file(t, folder/name, {'format': 'pt'})


def header(file, change):
    "A weight file with another header before the same numbers."
    data = file.read_bytes()
    n = struct.unpack('<Q', data[:8])[0]
    said = json.loads(data[8:8+n])
    change(said)
    text = json.dumps(said).encode()
    file.write_bytes(struct.pack('<Q', len(text)) + text + data[8+n:])


def pop(name): return lambda t: t.pop(name)
def put(name, value): return lambda t: t.update({name: value})
def write(path, text): return lambda d: (d/path).write_text(text)
def cut(path, n): return lambda d: (d/path).write_bytes((d/path).read_bytes()[:n])
def config(**change): return lambda d: edited(d/'B'/'config.json', **change)
def of_adapter(**change): return lambda d: edited(d/'Q'/'adapter_config.json', **change)
def in_header(change): return lambda d: header(d/'B'/'model.safetensors', change)
def in_weights(change): return lambda d: weights(d/'B', change)
def words(model='B', **vocab): return lambda d: Tokenizer(WordLevel(vocab, 'a')).save(str(d/model/'tokenizer.json'))
def in_adapter(change): return lambda d: weights(d/'Q', change, 'adapter_model.safetensors')


NORM, HEAD = 'model.norm.weight', 'lm_head.weight'
INDEX = 'B/model.safetensors.index.json'


def moved_to_index(text):
    def change(d):
        (d/'B'/'model.safetensors').rename(d/'B'/'m.safetensors')
        (d/INDEX).write_text(text)
    return change


@pytest.mark.parametrize('change,says', [
    (lambda d: shutil.rmtree(d/'B'), ('no folder B', 'Correct the path.')),
    (lambda d: (d/'B'/'config.json').unlink(), 'no config.json'),
    (write('B/config.json', '{"a": '), 'config.json is no JSON object'),
    (write('B/config.json', '[]'), 'config.json is no JSON object'),
    (lambda d: (d/'B'/'config.json').write_bytes(b'\xff\xfe'), 'config.json is no JSON object'),
    (config(hidden_size='wide'), 'config.json'),
    (config(num_hidden_layers=3), 'num_hidden_layers (2 and 3)'),
    (config(architectures=['MistralForCausalLM']), 'MistralForCausalLM'),
    (config(rope_theta=5e5), ('rope_theta', '500000.0')),
    (config(quantization_config=dict(quant_method='gptq')), 'is quantized (gptq)'),
    (config(transformers_weights='../A/model.safetensors'), 'expected a file of the folder'),
    (lambda d: (d/'B'/'model.safetensors').unlink(), 'holds no weights'),
    (lambda d: (d/'B'/'model.safetensors').rename(d/'B'/'pytorch_model.bin'),
     ('pytorch_model.bin', 'save_pretrained', 'Convert it once')),
    (moved_to_index('{'), 'is no JSON object'),
    (moved_to_index('{"weight_map": []}'), 'no weight_map'),
    (moved_to_index('{"weight_map": {"a": "../A/model.safetensors"}}'), 'no weight_map of files beside it'),
    (moved_to_index('{"weight_map": {"a": "gone.safetensors"}}'), "lacks ['gone.safetensors']"),
    (moved_to_index('{"weight_map": {"a": "m.safetensors", "b": "model-1-of-3.safetensors"}}'), 'lacks'),
    (cut('B/model.safetensors', 4), 'no whole safetensors file'),
    (cut('B/model.safetensors', 300), 'no whole safetensors file'),
    (cut('B/model.safetensors', -7), ('no whole safetensors file', 'file not fully covered')),
    (write('B/model.safetensors', ''), 'no whole safetensors file'),
    (in_header(lambda h: h[NORM].update(data_offsets=[-64, 0])), ('no whole safetensors file', '-64')),
    (in_header(lambda h: h[NORM].update(data_offsets=h[HEAD]['data_offsets'])), 'no whole safetensors file'),
    (in_header(lambda h: h[NORM].update(data_offsets=['a', 'b'])), 'no whole safetensors file'),
    (in_header(lambda h: h[NORM].pop('dtype')), 'no whole safetensors file'),
    (in_header(lambda h: h[NORM].update(dtype='F7')), ('no whole safetensors file', 'F7')),
    (in_header(lambda h: h[NORM].update(dtype='U32')), 'is U32'),
    (in_header(lambda h: h[NORM].update(shape=[-16])), 'no whole safetensors file'),
    (in_header(lambda h: h.update({NORM: 5})), 'no whole safetensors file'),
    (in_weights(pop(NORM)), f'lacks {NORM} (16,)'),
    (in_weights(put('model.layers.9.w', torch.ones(2, 3))), 'model.layers.9.w (2, 3)'),
    (in_weights(put(NORM, torch.ones(8))), (f'{NORM} is (16,)', '(8,)', 'expected equal shapes')),
    (in_weights(lambda t: t[HEAD][5, 6:7].fill_(math.nan)), (f'{HEAD} (40, 16)', 'is nan at (5, 6)', 'finite weights')),
    (in_weights(lambda t: t[HEAD][5, 6:7].fill_(math.inf)), ('is inf at (5, 6)', 'take an earlier checkpoint')),
    (in_weights(put(NORM, torch.ones(WIDTH, dtype=torch.float16))), ('F32 and F16', 'Give --dtype')),
    (write('B/tokenizer.json', '{'), ('A and B differ in tokenizer.json', 'B holds no tokenizer')),
    (write('B/tokenizer.json', '{"model": 3}'), ('A and B differ in tokenizer.json', 'B holds no tokenizer')),
    (write('B/tokenizer.json', '{"model": {"vocab": [["a", 0], []]}}'), 'B holds no tokenizer that transformers loads'),
    (words(a=0, c=1), ('only in', ': b (1 in all)', ': c (1 in all)')),
    (lambda d: (words(a=0, b=1, c=2)(d), in_weights(put(HEAD, torch.ones(41, WIDTH)))(d)),
     ('only in', ': c (1 in all)')),
    (words(a=1, b=0), "with another id: 'a' (0 and 1), 'b' (1 and 0)"),
    (lambda d: (d/'B'/'model.safetensors').open('ab').write(b'more'), 'file not fully covered'),
    (in_header(pop(HEAD)), ('all it names, one after another', 'invalid offset')),
    (config(rms_norm_eps=1e-6), 'rms_norm_eps (1e-05 and 1e-06)'),
    (config(attention_bias=True), 'attention_bias (False and True)'),
], ids=lambda x: x if isinstance(x, str) else None)
def test_a_checkpoint_that_cannot_be_merged(here, capsys, change, says):
    change(here)
    if (here/'B'/'tokenizer.json').is_file(): words('A', a=0, b=1)(here)
    err = refused(capsys, ['merge', '--method', 'linear', 'A', 'B', 'out'], says)
    assert 'expected' in err and err.count('\n') == 1, err
    assert sorted(p.name for p in here.iterdir() if p.name not in 'ABPQ') == []     # nothing is left


@pytest.mark.parametrize('change,says', [
    (write('Q/adapter_config.json', '{'), 'no JSON object'),
    (write('Q/adapter_config.json', '[]'), 'no JSON object'),
    (of_adapter(peft_type='IA3'), 'expected plain LoRA'),
    (of_adapter(use_dora=True), 'use_dora'),
    (of_adapter(init_lora_weights='pissa'), 'pissa'),
    (of_adapter(never_heard_of=1), 'never_heard_of'),
    (of_adapter(layer_replication=[[0, 2]]), 'layer_replication'),
    (of_adapter(bias='all'), 'bias'),
    (of_adapter(r='gone'), "'r': None"),
    (of_adapter(lora_alpha='gone'), "'lora_alpha': None"),
    (of_adapter(r=0), "'r': 0"),
    (of_adapter(r=4), 'rank 4'),
    (of_adapter(r='two'), "'r': 'two'"),
    (of_adapter(lora_alpha=math.nan), "'lora_alpha': nan"),
    (of_adapter(lora_alpha=math.inf), "'lora_alpha': inf"),
    (of_adapter(lora_alpha=1e300), "'lora_alpha': 1e+300"),
    (of_adapter(r=math.nan), "'r': nan"),
    (of_adapter(alpha_pattern={'q_proj': math.nan}), 'alpha_pattern'),
    (of_adapter(rank_pattern={'q_proj': 1e300}), 'rank_pattern'),
    (of_adapter(base_model_name_or_path=3), "'base_model_name_or_path': 3"),
    (of_adapter(base_model_name_or_path=['x']), "'base_model_name_or_path': ['x']"),
    (of_adapter(revision='v2'), "revisions ['main', 'v2'] of org/base"),
    (of_adapter(base_model_name_or_path='org/other'), 'Merge adapters of one base'),
    (lambda d: (d/'Q'/'adapter_model.safetensors').unlink(), 'expected weights in safetensors'),
    (cut('Q/adapter_model.safetensors', 100), 'adapter_model.safetensors'),
    (cut('Q/adapter_model.safetensors', -5), 'adapter_model.safetensors'),
    (in_adapter(lambda t: t.clear()), 'holds no tensors'),
    (in_adapter(lambda t: t.pop(sorted(t)[0])), 'A and B matrices'),
    (in_adapter(lambda t: t.update({sorted(t)[0]: torch.empty(0)})), 'finite matrices'),
    (in_adapter(lambda t: t[sorted(t)[0]].fill_(math.inf)), 'no numbers'),
    (in_adapter(lambda t: [t.pop(k) for k in sorted(t)[:2]]), 'expected adapters of the same weights'),
    (lambda d: (shutil.rmtree(d/'Q'), checkpoint(d/'Q', 1)), 'adapters and checkpoints'),
], ids=lambda x: x if isinstance(x, str) else None)
def test_an_adapter_that_cannot_be_merged(here, capsys, change, says):
    change(here)
    refused(capsys, ['merge', '--method', 'linear', 'P', 'Q', 'out'], says)
    assert sorted(p.name for p in here.iterdir() if p.name not in 'ABPQ') == []


TWO = 'models:\n  - {model: A, parameters: {weight: 1}}\n  - {model: B, parameters: {weight: 1}}\n'


@pytest.mark.parametrize('text,says', [
    ('', 'no merge_method'),
    ('a: [', ('is no YAML', 'line')),
    ('models:\n\t- model: A\n', ('is no YAML', 'line 2')),
    ('- 1\n', 'no merge_method'),
    (TWO, 'no merge_method'),
    (TWO + 'merge_method: [linear]\n', "['linear']"),
    (TWO + 'merge_method: passthrough\n', "method 'passthrough'"),
    (TWO + 'merge_method: linear\ntokeniser: base\n', 'tokeniser'),
    (TWO + 'merge_method: linear\n' + TWO, ("the key 'models' stands twice", 'line 5')),
    ('models:\n  - {model: A, parameters: {weight: [{filter: mpl, value: 2}, {value: 1}]}}\n'
     '  - {model: B, parameters: {weight: 1}}\nmerge_method: linear\n', "the filter 'mpl' of weight matches none"),
    ('models:\nmerge_method: linear\n', 'models is None'),
    ('models: A\nmerge_method: linear\n', "models is 'A'"),
    ('models: [A, B]\nmerge_method: linear\n', "models is ['A', 'B']"),
    ('models:\n  - {model: 3}\n  - {model: B}\nmerge_method: linear\n', 'model is 3'),
    ('models:\n  - {model: A}\nmerge_method: linear\n', '1 model'),
    (TWO + 'merge_method: linear\nslices: []\n', 'both of models and slices'),
    ('models:\n  - {model: A, parameters: {weight: heavy}}\n  - {model: B}\nmerge_method: linear\n', "'heavy'"),
    ('models:\n  - {model: A, parameters: {weight: .nan}}\n  - {model: B, parameters: {weight: 1}}\n'
     'merge_method: linear\n', 'nan'),
    ('models:\n  - {model: A, parameters: {weight: .inf}}\n  - {model: B, parameters: {weight: 1}}\n'
     'merge_method: linear\n', 'inf'),
    (TWO + 'merge_method: linear\nparameters: {normalize: maybe}\n', "'maybe'"),
    (TWO + 'merge_method: linear\nparameters: 3\n', 'parameters is 3'),
    (TWO + 'merge_method: linear\nparameters: {seed: abc}\n', 'seed'),
    (TWO + 'merge_method: linear\nbase_model: C\n', 'is none of'),
    (TWO + 'merge_method: linear\ndtype: int8\n', "dtype 'int8'"),
    (TWO + 'merge_method: linear\ntokenizer_source: C\n', "tokenizer of 'C'"),
    ('models:\n  - {model: A}\n  - {model: B}\nmerge_method: slerp\nparameters: {t: 2}\n', 't=2'),
    ('models:\n  - {model: A}\n  - {model: B}\n  - {model: A}\nmerge_method: slerp\nparameters: {t: 0.5}\n',
     '3 models'),
    ('models:\n  - {model: A}\n  - {model: B}\nmerge_method: ties\n', 'Give --base'),
    ('models:\n  - {model: A}\n  - {model: B, parameters: {weight: 1, density: 2}}\nbase_model: A\n'
     'merge_method: ties\n', 'density=2'),
    ('slices:\n  - sources:\n      - {model: A, layer_range: [0, 2]}\n      - {model: B, layer_range: [0, 1]}\n'
     'merge_method: slerp\nparameters: {t: 0.5}\n', 'expected one slice over all'),
    *(('slices:\n  - sources:\n      - {model: A, layer_range: [0, N]}\n      - {model: B, layer_range: [0, N]}\n'
       'merge_method: slerp\nbase_model: A\nparameters: {t: 0.5}\n'.replace('N', n),
       f'layer_range [0, {n}] of models with 2 layers') for n in ('1', '40')),
    ('slices:\n  - sources:\n      - {model: A}\n      - {model: B}\nmerge_method: slerp\nparameters: {t: 0.5}\n',
     'layer_range is None'),
], ids=lambda x: x if isinstance(x, str) else None)
def test_a_recipe_that_cannot_be_followed(here, capsys, text, says):
    (here/'r.yml').write_text(text)
    assert refused(capsys, ['merge', 'r.yml', 'out'], says).count('\n') == 1
    assert not (here/'out').exists()


@pytest.mark.parametrize('argv,says', [
    ('merge A B out', 'no --method'),
    ('merge --method linear A out', 'expected 2 or more'),
    ('merge --method linear --weights 1 A B out', '1 weights for 2 models'),
    ('merge --method linear --weights a A B out', 'expected numbers'),
    ('merge --method linear --weights 0.5 0.5 1 2 out', 'Put commas between the weights'),
    ('merge --method linear --weights -1e-1 .1 A B out', 'sum'),
    ('merge --method linear --weights .5 .6 A B out', ('sum to 1.1', '--normalize')),
    ('merge --method linear --weights nan,1 A B out', 'nan'),
    ('merge --method linear --weights 1,-1 A B out', 'sum'),
    ('merge --method linear --t 0.5 A B out', 'SLERP alone takes one'),
    ('merge --method slerp --t nan A B out', "'nan'; expected a number"),
    ('merge --method slerp --t 1.5 A B out', 't=1.5'),
    ('merge --method slerp --weights 1,1 A B out', 'expected none but t'),
    ('merge --method karcher A B out', ('karcher', 'slerp')),
    ('merge --method linear --lambda 2 A B out', 'lambda'),
    ('merge --method ties A B out', 'Give --base'),
    ('merge --method linear --base A A B out', 'expected neither base nor lambda'),
    ('merge --method ties --base A --density 0 B out', 'density=0'),
    ('merge --method linear --device xyz A B out', "device 'xyz' cannot be used"),
    ('merge --method linear --device mps A B out', "device 'mps' cannot be used for a merge; expected cpu"),
    ('merge --method linear --device meta A B out', "device 'meta' cannot be used for a merge; expected cpu"),
    ('merge --method linear --seed 3 A B out', 'linear with seed=3'),
    ('merge --method linear --seed 3 P Q out', 'linear with seed=3'),
    ('merge --method slerp --normalize A B out', 'slerp with normalize=True'),
    ('merge --method linear --threads -1 P Q out', '--threads with adapters'),
    ('merge --method linear --device meta P Q out', '--device with adapters'),
    ('merge --method linear --shard-size 1e300 P Q out', '--shard-size with adapters'),
    ('merge --method task_arithmetic --base A --weights 1e200,1 P Q out', 'becomes too large for float32'),
    ('merge --method task_arithmetic --base A --weights 1e45,1 B A out', 'too large for F32'),
    ('merge --method task_arithmetic --base A --weights 1e45,1 --dtype bfloat16 B A out', 'too large for BF16'),
    ('merge --method linear --shard-size 0 A B out', '--shard-size'),
    ('merge --method linear --shard-size 1e300 A B out', '--shard-size'),
    ('merge --method linear --shard-size nan A B out', '--shard-size'),
    ('merge --method linear --shard-size inf A B out', '--shard-size'),
    ('merge --method linear --threads -1 A B out', '--threads'),
    ('merge --method linear --dtype int8 A B out', '--dtype'),
    ('merge --method linear A B A', 'A exists'),
    ('merge --method linear A B no/where', 'Make it first'),
    ('merge gone.yml out', 'gone.yml'),
    ('merge A out', 'no --method'),
    ('compare A gone', 'gone'),
    ('compare A P', 'no config.json'),
    ('compare A C', 'solar-repro: checkpoints: A and C differ in rms_norm_eps'),
    ('compare A N', 'solar-repro: model.norm.weight of the second model holds values that are no numbers'),
    ('compare A B --base N', 'model.norm.weight of the base model'),
    ('merge --method linear A B astray', 'solar-repro: astray exists'),
    ('merge --method linear P Q astray', 'astray exists'),
    ('tabel 5', "did you mean 'table'"),
    ('table 8', '8'),
    ('table five', 'five'),
    ('show', 'NAME'),
    ('status --profile smok', "did you mean 'smoke'"),
    ('status --profile smoke --seed -1', 'seed'),
    ('status --profile smoke --seed 4294967296', 'seed'),
    ('status --profile smoke --seed 1.5', '1.5'),
    ('status --profile smoke --store A/config.json', 'A/config.json'),
    ('status --profile smoke --store ~nouser/x', '~nouser/x: begins with ~ and names no user'),
    ('status --profile ~nouser/x --store s', 'names no user'),
    ('status --profile smoke --store=', 'expected a path'),
    ('status --profile smoke --store /dev/null', 'is no folder'),
    ('fetch --profile smoke --to ~nouser/x', 'names no user'),
    ('init ~nouser/x', 'names no user'),
    ('compare ~nouser/x A', 'names no user'),
    ('merge --method ties --base ~nouser/x A out', 'names no user'),
    ('merge --method linear A B ~nouser/x', 'names no user'),
    ('run --profile smoke --store s --workers 0', 'workers'),
    ('plan --profile smoke --store s --workers -1', '-1 workers; expected 1 or more'),
    ('plan --profile smoke --store s --workers 0', '0 workers; expected 1 or more'),
    ('clean gone --profile smoke --store s', 'gone is no folder'),
    ('clean A/config.json --profile smoke --store s', 'is no folder'),
    ('plan --profile smoke --store s --price -1', 'price'),
    ('plan --profile smoke --store s --price nan', 'price'),
    ('plan --profile smoke --store s --card H200', 'H200'),
], ids=lambda x: x if isinstance(x, str) else None)
def test_a_command_that_cannot_be_done(here, capsys, argv, says):
    for n in 'CN': shutil.copytree(here/'A', here/n)
    edited(here/'C'/'config.json', rms_norm_eps=.1)
    weights(here/'N', put(NORM, torch.full((WIDTH,), math.nan)))
    (here/'astray').symlink_to('nowhere')
    try: refused(capsys, argv.split(), says)
    except SystemExit as e:      # argparse
        err = capsys.readouterr().err
        assert e.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not (here/'out').exists() and not [*here.glob('.*.merging')]


@pytest.mark.parametrize('argv,says', [
    (['show', 'dpo v2'], "did you mean 'DPO v2'"),
    (['show', 'SFT v33'], "did you mean 'SFT v3'"),
    (['show', 'SFT v3', 'h6'], 'mean'),
    (['show', 'SFT v3', 'gsm9k'], 'gsm8k'),
    (['diff', 'SFT v1', 'nobody', '--task', 'arc'], 'nobody'),
    (['diff', 'SFT v1', 'SFT v1', '--task', 'arc'], "'SFT v1' twice"),
    (['export', 'data/openorca', 'out'], 'expected a model'),
    (['export', 'SFT v3', 'A'], 'A exists'),
])
def test_a_name_that_is_not_there(here, capsys, argv, says):
    refused(capsys, [*argv, '--profile', 'smoke', '--store', 's'], says)


@pytest.mark.parametrize('text,says', [
    ('extends = "smok"', "extends 'smok'"),
    ('extend = "smoke"', "did you mean 'extends'"),
    ('extends = "mine.toml"', 'no circle'),
    ('extends = "smoke"\n[sft\nlora_r = 8', ('not valid TOML', 'line 2')),
    ('extends = "smoke"\nname = "../../evil"', 'name'),
    ('extends = "smoke"\nname = ""', 'name'),
    ('extends = "smoke"\nseed = -1', 'seed'),
    ('extends = "smoke"\nseed = 4294967296', 'seed = 4294967296'),
    ('extends = "smoke"\nseeds = [0, 4294967296]', 'seeds.1'),
    ('extends = "smoke"\n[sft]\nmax_grad_norm = inf', 'finite'),
    ('extends = "smoke"\n[dpo]\nbeta = nan', 'dpo.beta'),
    ('extends = "smoke"\n[sft]\nlora_rank = 8', "did you mean 'lora_r'"),
    ('extends = "smoke"\n[sft]\nlora_r = "8"', 'sft.lora_r'),
    ('extends = "smoke"\n[sft]\nepochs = 0', 'sft.epochs'),
    ('extends = "smoke"\nsft = 3', 'sft = 3: must be a table, [sft]'),
    ('extends = "smoke"\nlabel = ""', 'label'),
    ('extends = "smoke"\nseeds = [0, 0]', 'each seed once'),
    ('extends = "smoke"\n[machine]\nthreads = 1000000', 'machine.threads'),
    ('extends = "smoke"\nsets = 3', 'sets'),
    ('extends = "smoke"\n[base]\nsource = ""', 'base.source'),
    ('extends = "smoke"\n[base]\nsource = "~nouser/x"', 'names no user'),
    ('extends = "smoke"\n[data]\nsource = "~nouser/x"', 'names no user'),
    ('extends = "smoke"\n[sets.mine]\nfile = "~nouser/x"', 'names no user'),
    ('extends = "smoke"\n[base]\nsource = "./gone"', 'no such folder'),
    ('extends = "smoke"\n[base]\nsource = "org/model"', 'no revision'),
    ('extends = "smoke"\n[base]\nsource = "org/model"\nrevision = "main"', '40 hexadecimal digits'),
    (f'extends = "smoke"\n[base]\nrevision = "{40*"a"}"', 'expected one of a base on the Hub only'),
    (f'extends = "smoke"\n[base]\nsource = "."\nrevision = "{40*"a"}"', 'expected one of a base on the Hub only'),
    (f'extends = "smoke"\n[data.revisions]\nalpaca_gtp4 = "{40*"a"}"', "did you mean 'alpaca_gpt4'"),
    ('extends = "smoke"\n[data.revisions]\nalpaca_gpt4 = ""', 'data.revisions.alpaca_gpt4'),
    ('extends = "smoke"\n[data]\nsource = ""', 'data.source'),
    ('extends = "smoke"\n[data]\nsource = "gone"', 'is no folder'),
    ('extends = "smoke"\n[template]\nprompt = "{question}"', 'exactly once'),
    ('extends = "smoke"\n[template]\nprompt = "{prompt} }"', "template.prompt = '{prompt} }': must hold"),
    ('extends = "smoke"\n[data.rows]\nopenroca = 4', "did you mean 'openorca'"),
    ('extends = "smoke"\n[eval.num_fewshot]\nmmlu = 6', 'at most 5'),
    ('extends = "smoke"\n[rows.""]\nsets = ["openorca"]', 'must be a plain name'),
    ('extends = "smoke"\n[rows."a/b"]\nsets = ["openorca"]', 'must be a plain name'),
    ('extends = "smoke"\n[rows."base"]\nsets = ["openorca"]', 'name of another row'),
    ('extends = "smoke"\n[rows."contamination"]\nsets = ["openorca"]', 'name of another stage'),
    ('extends = "smoke"\n[rows."SFT v1"]\nsets = ["openorca"]', 'name of another row'),
    ('extends = "smoke"\n[rows.A]\nsets = ["openorca", "openorca"]', 'each of its sets once'),
    ('extends = "smoke"\n[rows.A]\nsets = []', 'either sets'),
    ('extends = "smoke"\n[rows.A]\nsets = ["opnorca"]', "did you mean 'openorca'"),
    ('extends = "smoke"\n[rows.A]\nsets = ["openorca"]\nstart = "sft v3"', "did you mean 'SFT v3'"),
    ('extends = "smoke"\n[rows.A]\nsets = ["ultrafeedback_clean"]', 'holds pairs'),
    ('extends = "smoke"\n[rows.A]\nweights = {"Cand. 1" = 0.5, "Cand. 2" = 0.6}', 'sum to 1'),
    ('extends = "smoke"\n[rows.A]\nweights = {"Merge v4" = 0.5, "Cand. 2" = 0.5}', 'no sum of adapters'),
    ('extends = "smoke"\n[rows.A]\nweights = {"Cand. 1" = 0.5, "Cand. 2" = 0.5}\nmethod = "glue"', 'glue'),
    ('extends = "smoke"\n[sets.base]\nfile = "rows.jsonl"', 'a name that is taken'),
    ('extends = "smoke"\n[sets.openorca]\nfile = "rows.jsonl"', 'name of a set of the package'),
    ('extends = "smoke"\n[sets.mine]\nfile = "gone.jsonl"', 'there is no file'),
    ('extends = "smoke"\n[sets.mine]\nfile = "text.jsonl"', "has the keys ['text']"),
    ('extends = "smoke"\n[sets.mine]\nfile = "empty.jsonl"', 'empty.jsonl: holds no rows'),
], ids=lambda x: x if isinstance(x, str) else None)
def test_a_profile_that_cannot_be_run(tmp_path, capsys, text, says):
    (tmp_path/'mine.toml').write_text(text)
    (tmp_path/'rows.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path/'text.jsonl').write_text('{"text": "a"}\n')
    (tmp_path/'empty.jsonl').touch()
    refused(capsys, ['status', '--profile', str(tmp_path/'mine.toml'), '--store', str(tmp_path/'s')], says)


ITEMS = dict(
    arc=dict(question='Which?', choices=dict(text=['a', 'b', 'c'], label=['A', 'B', 'C']), answerKey='C'),
    hellaswag=dict(activity_label='Walk', ctx_a='a', ctx_b='b', ctx='a b', endings=['c', 'd', 'e', 'f'], label='3'),
    mmlu=dict(question='Why?', subject='anatomy', choices=['a', 'b', 'c', 'd'], answer=3),
    truthfulqa=dict(question='Is it?', mc1_targets=dict(choices=['a', 'b'], labels=[1, 0]),
                    mc2_targets=dict(choices=['a', 'b', 'c'], labels=[1, 0, 0])),
    winogrande=dict(sentence='Once _ saw.', option1='Ann', option2='Bea', answer='1'),
    gsm8k=dict(question='2 + 3?', answer='Five.\n#### 5'))


def in_folder(d, name, *lines):
    f = FILES[name]
    (d/f.folder).mkdir(exist_ok=True)
    path = d/f.folder/f'{f.stems[0]}.jsonl'
    path.write_text(''.join(x if isinstance(x, str) else json.dumps(x) + '\n' for x in lines))
    return path


@pytest.mark.parametrize('task,change,says', [
    ('arc', dict(choices=dict(text=['a', 'b'], label=['A', 'B', 'C'])), '3 labels for 2 choices'),
    ('arc', dict(choices=dict(text=['a', 'b', 'c'], label=['A', 'C'])), '2 labels for 3 choices'),
    ('arc', dict(choices=dict(text=['a', 'b', 'c'], label=['A', 'C', 'C'])), 'expected different ones'),
    ('arc', dict(choices=dict(text=['a', '', 'c'], label=['A', 'B', 'C'])), 'has nothing in field choices (2)'),
    ('arc', dict(choices=dict(text=['a', 2, 'c'], label=['A', 'B', 'C'])), 'has 2 as choice 2'),
    ('arc', dict(choices=dict(text=['a'], label=['C'])), '1 choices'),
    ('arc', dict(choices=['a', 'b', 'c']), "no field 'choices.text'"),
    ('arc', dict(answerKey='D'), "has 'D' in field 'answerKey'"),
    ('hellaswag', dict(label=''), "nothing in field 'label'"),
    ('hellaswag', dict(label='4'), "has '4' in field 'label'"),
    ('hellaswag', dict(label=3), 'has int'),
    ('hellaswag', dict(endings=['a', 'b', ' ', 'd']), 'has nothing in field choices (3)'),
    ('mmlu', dict(choices=['a', 'b', 'c'], answer=0), '3 choices; expected four'),
    ('mmlu', dict(choices=list('abcde')), '5 choices; expected four'),
    ('mmlu', dict(answer=4), "has '4' in field 'answer'"),
    ('mmlu', dict(answer='D'), "has str 'D' in field 'answer'"),
    ('mmlu', dict(answer=True), 'has bool'),
    ('truthfulqa', dict(mc2_targets=dict(choices=['a', 'b'], labels=[1, 0, 0])), '3 labels for 2 choices in mc2'),
    ('truthfulqa', dict(mc1_targets=dict(choices=['a', 'b'], labels=[1])), '1 labels for 2 choices in mc1'),
    ('truthfulqa', dict(mc2_targets=dict(choices=['a', 'b'], labels=[0, 0])), 'labels [0, 0]'),
    ('truthfulqa', dict(mc2_targets=dict(choices=['a', 'b'], labels=[1, 2])), 'labels [1, 2]'),
    ('winogrande', dict(sentence='Once she saw.'), 'expected one _'),
    ('winogrande', dict(option2='Ann'), "'Ann' twice"),
    ('winogrande', dict(answer='3'), "has '3' in field 'answer'"),
    ('gsm8k', dict(answer='Five.'), "'#### number'"),
    ('gsm8k', dict(answer='Five.\n#### five'), "'#### number'"),
    ('gsm8k', dict(question=None), "in field 'question'"),
])
def test_an_item_that_cannot_be_asked_names_file_line_and_field(tmp_path, task, change, says):
    path = in_folder(tmp_path, f'{task}/test', ITEMS[task], ITEMS[task] | change)
    for part in BENCHMARKS[task].files[:-1]: in_folder(tmp_path, part.name, ITEMS[task])
    with pytest.raises(ValueError) as e: source_of(str(tmp_path)).items(task, 1)
    assert f'{path}: line 2 ' in str(e.value) and says in str(e.value)


@pytest.mark.parametrize('task', ITEMS)
def test_blank_lines_and_a_mark_before_the_first_are_no_fault(tmp_path, task):
    in_folder(tmp_path, f'{task}/test', '\ufeff', ITEMS[task], '\n', ITEMS[task], '\n \n')
    for part in BENCHMARKS[task].files[:-1]: in_folder(tmp_path, part.name, ITEMS[task], '\n')
    found, ids = source_of(str(tmp_path)).items(task, 5)
    assert len(found['test']) == 2 and [i.rsplit(':')[-1] for i in ids] == ['1', '3']


PAIR = dict(prompt='a', chosen='b', rejected='c')


@pytest.mark.parametrize('line,says', [
    ('{"prompt": ', 'line 2 is no JSON'),
    ('NaN', 'line 2 is a float'),
    ('[1]', 'line 2 is a list'),
    ('"text"', 'line 2 is a str'),
    (b'{"prompt": "\xff"}', 'line 2 is not UTF-8'),
    ('[' * 100_000, 'line 2 is no JSON'),
    ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "line 2 has the key 'prompt' more than once"),
    (PAIR | dict(rejected='b'), "in fields 'chosen' and 'rejected'"),
    (PAIR | dict(rejected=' b\n'), "in fields 'chosen' and 'rejected'"),
    (PAIR | dict(chosen=''), "nothing in field 'chosen'"),
    (PAIR | dict(prompt=['a', 'b']), "in field 'prompt'; expected str"),
    (PAIR | dict(chosen=None), "in field 'chosen'"),
    (PAIR | dict(system='Be brief.'), 'has the keys'),
    (dict(prompt='a', completion='b'), "has no field 'chosen'"),
    ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}', 'half a character'),
], ids=lambda x: x[:20] if isinstance(x, str) else None)
def test_a_row_of_ones_own_that_cannot_be_trained_on(tmp_path, line, says):
    path = tmp_path/'mine.jsonl'
    text = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(json.dumps(PAIR).encode() + b'\n' + text + b'\n')
    with pytest.raises(ValueError) as e: read_custom(path)
    assert str(path) in str(e.value)
    for word in says if isinstance(says, tuple) else (says,): assert word in str(e.value), str(e.value)


@pytest.mark.parametrize('talks', [
    dict(chosen=['a', 'b', 'c', 'd']), dict(rejected=['a', 'b', 'c', 'd']), dict(chosen=['a']*3),
    dict(chosen=['q', 'no'])])
def test_dialogues_of_several_turns_and_equal_answers_are_left_out_and_counted(tmp_path, talks):
    def talk(texts): return [dict(role=('user', 'assistant')[k % 2], content=t) for k, t in enumerate(texts)]
    row = dict(prompt='q', chosen=talk(['q', 'yes']), rejected=talk(['q', 'no']))
    in_folder(tmp_path, 'ultrafeedback', row, row | {k: talk(t) for k, t in talks.items()})
    got = source_of(str(tmp_path)).rows('ultrafeedback_clean', 1, 0)
    assert got.rows == [dict(prompt='q', chosen='yes', rejected='no')] and got.n_found == 1
    assert got.rule == '1 rows left out, of several turns or with two equal answers'


@pytest.mark.parametrize('change,says', [
    (config(model_type='bert', architectures=['BertForMaskedLM']), 'not a causal language model'),
    (config(auto_map=dict(AutoModel='x.Y')), 'remote code is not run'),
    (config(quantization_config=dict(quant_method='bitsandbytes')), 'quantized (bitsandbytes)'),
    (write('B/config.json', '{'), 'no JSON object'),
    (lambda d: None, 'no tokenizer that transformers loads'),
    (write('B/generation_config.json', '{"suppress_tok'), 'generation_config.json is no JSON object'),
])
def test_a_base_that_cannot_be_trained(here, change, says):
    change(here)
    with pytest.raises(ValueError, match=says.replace('(', r'\(').replace(')', r'\)')): check_base(here/'B')
