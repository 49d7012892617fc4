"""Text to tokens for all kinds of tokenizer, and which files of a folder are the model, held against transformers."""
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from solar_repro.core.config import Template
from solar_repro.inference.lm import RequestEncoder, encode_pairs
from solar_repro.models.loading import encode, token_ids

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
