"Profiles: which one is taken, and what somebody with an old one is told."
import pytest

from solar_repro.core.config import default_profile, load_profile
from solar_repro.stages.graph import build_graph


@pytest.mark.parametrize('environment,expected', [
    ({}, 'tiny'), (dict(IN_TEST='1'), 'smoke'), (dict(SOLAR_PROFILE='a100'), 'a100'),
    (dict(SOLAR_PROFILE='a100', IN_TEST='1'), 'a100'), (dict(SOLAR_PROFILE=''), 'tiny')])
def test_the_environment_chooses_where_nobody_does(monkeypatch, environment, expected):
    for name in ('SOLAR_PROFILE', 'IN_TEST'): monkeypatch.delenv(name, raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    assert default_profile() == expected == load_profile().name
    assert load_profile('smol').name == 'smol'


def test_a_profile_of_ones_own_is_chosen_by_its_path(tmp_path, monkeypatch):
    (tmp_path/'mine.toml').write_text('extends = "smoke"\n')
    monkeypatch.setenv('SOLAR_PROFILE', str(tmp_path/'mine.toml'))
    assert load_profile().name == 'mine'


@pytest.mark.parametrize('text,says', [
    ('[sft]\npasses = 2', "sft.passes: is 'microbatches' now"),
    ('[dpo]\npass_tokens = 512', "dpo.pass_tokens: is 'max_tokens_per_microbatch' now"),
    ('[merge]\nhandover = "full"', "merge.handover: is 'merge_onto' now, and 'full' is 'original'"),
    ('[merge]\nhandover = "dequantised"', "merge.handover: is 'merge_onto' now, and 'dequantised' is 'dequantized'"),
    ('[merge]\nmerge_onto = "full"', "merge.merge_onto = 'full': is 'original' now")])
def test_an_old_key_or_value_is_answered_with_the_new_one(tmp_path, text, says):
    (tmp_path/'old.toml').write_text(f'extends = "tiny"\n{text}\n')
    with pytest.raises(ValueError) as e: load_profile(tmp_path/'old.toml')
    assert says in str(e.value)


@pytest.mark.parametrize('name', ['../../evil', '/tmp/evil', 'a/b', '.hidden', '', ' x', r'a\\b', r'a\nb', 101*'x'])
def test_a_name_is_no_path(tmp_path, name):
    "Of a profile, whose results would lie there, of a row and of a set, which would be taken for another stage."
    (tmp_path/'d.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')
    for text, where in ((f'name = "{name}"\n', 'name'),
                        (f'[rows."{name}"]\nsets = ["alpaca_gpt4"]\n', 'rows'),
                        (f'[sets."{name}"]\nfile = "d.jsonl"\n', 'sets')):
        (tmp_path/'own.toml').write_text(f'extends = "smoke"\n{text}')
        says = f'(?s)own.toml: {where}.*must be a plain name'
        with pytest.raises(ValueError, match=says): load_profile(tmp_path/'own.toml')


@pytest.mark.parametrize('name', ['base', 'contamination', 'SFT v3', 'mine step 1'])
def test_a_row_named_like_a_stage_is_refused(tmp_path, name):
    pairs = 'start = "SFT v3"\nsets = ["ultrafeedback_clean", "synth_math_alignment"]\n'
    rows = f'[rows.mine]\n{pairs}' if 'mine' in name else ''
    (tmp_path/'own.toml').write_text(f'extends = "smoke"\n[rows."{name}"]\nsets = ["alpaca_gpt4"]\n{rows}')
    with pytest.raises(ValueError, match='has the name of another'): build_graph(load_profile(tmp_path/'own.toml'))
