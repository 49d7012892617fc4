"""Recipes in all the forms that mergekit reads: one model under two paths, a base among the models, keys unread."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from solar_repro.merging.config import from_yaml, to_yaml
from solar_repro.reports.cli import main

WEIGHT = {'model.layers.0.w': (2, 2)}
TWO = 'models: [{model: A, parameters: {weight: 1}}, {model: C, parameters: {weight: 3}}]\n'


def checkpoint(folder, value, **config):
    folder.mkdir()
    save_file({n: torch.full(s, value) for n, s in WEIGHT.items()}, folder/'model.safetensors', {'format': 'pt'})
    (folder/'config.json').write_text(json.dumps(dict(model_type='toy', architectures=['Toy']) | config))
    (folder/'generation_config.json').write_text(json.dumps(dict(of=folder.name)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    for n, v in dict(A=1., B=2., C=3.).items(): checkpoint(tmp_path/n, v)
    (tmp_path/'sub').mkdir()
    (tmp_path/'link').symlink_to('C')
    return tmp_path


@pytest.mark.parametrize('base', ['C', './C/', 'sub/../C', 'link', '~/C', '{}/C'])
def test_a_base_is_the_model_of_the_same_folder(base, here):
    base = base.format(here)
    ties = from_yaml(f'{TWO}base_model: {base}\nmerge_method: ties\n')
    assert (ties.models, ties.base) == (('A',), base)
    assert from_yaml(f'{TWO}base_model: {base}\nmerge_method: slerp\nparameters: {{t: 0.5}}\n'.replace(
        ', parameters: {weight: 1}', '').replace(', parameters: {weight: 3}', '')).models == ('C', 'A')


def test_a_mean_takes_its_files_from_the_base(here):
    (here/'r.yml').write_text(f'{TWO}base_model: C\nmerge_method: linear\n')
    assert main(['merge', 'r.yml', 'out']) == 0
    assert json.loads((here/'out'/'generation_config.json').read_text()) == dict(of='C')
    assert torch.equal(load_file('out/model.safetensors')['model.layers.0.w'], torch.full((2, 2), 2.5))
    r = from_yaml((here/'r.yml').read_text())
    assert from_yaml(to_yaml(r)) == r and r.models == ('C', 'A')


@pytest.mark.parametrize('tokenizer, says', [
    ('tokenizer_source: A\ntokenizer: {source: base}', 'expected one of them'),
    ('tokenizer_source: C\ntokenizer:', "takes the tokenizer of 'C'"),
    ('tokenizer_source: union', 'has none'), ('tokenizer: {source: base}', 'has none'),
    ('tokenizer_source: union\nbase_model: C', ''), ('tokenizer: {source: C}\nbase_model: link', ''),
    ('tokenizer_source: base', 'has none')])
def test_a_tokenizer_comes_from_one_place(tokenizer, says, here):
    (here/'C'/'vocab.txt').write_text('a\n')
    read = lambda: from_yaml(f'{TWO}{tokenizer}\nmerge_method: linear\n')
    if not says: assert read().models[0] in ('C', 'link')
    else:
        with pytest.raises(ValueError, match=says): read()


@pytest.mark.parametrize('text, says', [
    ('models: [{model: A}, {model: C, parameters: {wieght: 2}}]\nbase_model: C\nmerge_method: ties', 'wieght'),
    ('models: [{model: A}, {model: link, parameters: {frob: 2}}]\nbase_model: C\nmerge_method: ties', 'frob'),
    ('models: [{model: A}, {model: C, parameters: {weight: x}}]\nbase_model: C\nmerge_method: ties', "'x'"),
    ('models: [{model: A}, {model: C, parameters: {lambda: 2}}]\nbase_model: C\nmerge_method: ties', 'lambda'),
    (f'{TWO}merge_method: linear\nparameters: {{int8_mask: maybe}}', "int8_mask is 'maybe'"),
    (f'{TWO}merge_method: linear\nparameters: {{int8_mask: [true]}}', 'int8_mask is'),
    (f'{TWO}merge_method: linear\ndtype: torch.int8', "dtype 'torch.int8'"),
    (f'{TWO}merge_method: linear\ndtype: int8\nout_dtype: float16', "dtype 'int8'"),
    ('a: !!bool maybe', 'is no YAML'), ('a: !!int ""', 'is no YAML'), ('a: !!timestamp foo', 'is no YAML'),
    ('a: !!float ""', 'is no YAML'), ('['*5000, 'is no YAML'),
    (f'{TWO}merge_method: linear\n'.replace('weight: 3', f'weight: 1{"0"*400}'), 'weight is 1000'),
], ids=lambda x: x[:80])
def test_a_recipe_that_says_what_is_not_done_is_refused(text, says, here, capsys):
    (here/'r.yml').write_text(text)
    status, err = main(['merge', 'r.yml', 'out']), capsys.readouterr().err
    assert status == 2 and says in err and 'expected' in err and 'Traceback' not in err, err


@pytest.mark.parametrize('said, want', [('dtype: torch.bfloat16', 'bfloat16'), ('dtype: float16', 'float16'),
                                        ('dtype: float32\nout_dtype: torch.float16', 'float16'), ('dtype:', None)])
def test_dtypes_are_named_as_mergekit_names_them(said, want):
    assert from_yaml(f'{TWO}merge_method: linear\n{said}\n').dtype == want


def test_a_mask_and_the_entry_of_a_base_may_stand_there():
    text = f'{TWO}base_model: C\nmerge_method: ties\nparameters: {{int8_mask: true, lambda: 2}}\n'
    assert from_yaml(text).models == ('A',)
