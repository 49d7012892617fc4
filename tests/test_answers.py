"What a person asks of a model is put to it as benchmarks are: the same tokens, the same ends."
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from test_sources import model_of

from solar_repro.core.config import load_profile, Template
from solar_repro.inference.lm import RequestEncoder, SharedPrefixLM
from solar_repro.models.adapters import AdaptedModel, materialize
from solar_repro.models.loading import load_tokenizer, render
from solar_repro.pipeline.builder import generate
from solar_repro.tiny.world import shipped_base

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('adds_bos', [True, False])
def test_an_answer_is_what_a_benchmark_would_read(tmp_path, adds_bos):
    "A tokenizer that begins texts with a BOS did so in training and scoring, and not for `generate` and `demo`."
    model_of(tmp_path, 'llama', False, 'byte', adds_bos, True)
    template, model = load_profile('smoke').template, materialize(AdaptedModel(tmp_path))
    lm = SharedPrefixLM(model, RequestEncoder(load_tokenizer(tmp_path)))
    for prompt in ('Say river.', 'What is 6 times 7?', 'Name a colour of the sky.'):
        text = render(template, prompt)[0]
        asked = Instance('generate_until', {}, (text, dict(until=[], max_gen_toks=12, do_sample=False)), 0)
        assert generate(model, tmp_path, template, prompt, 12) == lm.generate_until([asked])[0].strip()


@pytest.mark.parametrize('prompt,template', [('word '*3000, 'Question: {prompt}'), ('', '{prompt}')])
def test_a_prompt_that_cannot_be_read_is_not_answered(prompt, template):
    with pytest.raises(ValueError, match='the prompt has .* tokens; expected 1 to'):
        around = Template(prompt=template, separator=' ')
        generate(materialize(AdaptedModel(shipped_base())), shipped_base(), around, prompt, 12)


def test_the_page_of_answers_is_what_the_recorded_run_gives(tmp_path, monkeypatch):
    "Its items, prompts and texts, byte by byte: nobody has chosen or mended one by hand."
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    monkeypatch.setenv('SOLAR_STORE', str(tmp_path/'store'))
    import record_answers
    monkeypatch.setattr('sys.argv', ['record_answers', '--out', str(tmp_path/'answers.json')])
    record_answers.main()
    assert (tmp_path/'answers.json').read_bytes() == (ROOT/'nbs'/'recorded'/'answers.json').read_bytes()
