"""Published rows and items in forms that a reader or a scorer would take without a word, or stop at without one."""
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from test_bad_inputs import ITEMS, in_folder
from test_sources import rows_of, turns

from solar_repro.core.data_files import custom_fields, read_file, read_custom
from solar_repro.data import BENCHMARKS, FILES, item_problem
from solar_repro.eval import build_requests, by_item, collect, run_requests
from solar_repro.stages.sources import STAND_IN, source_of


def published(d, task, *rows):
    "A folder with these items, and the examples that go before them."
    path = in_folder(d, f'{task}/test', *rows)
    for part in BENCHMARKS[task].files[:-1]: in_folder(d, part.name, *[ITEMS[task]]*3)
    return path


def labelled(*labels, text='abc'): return dict(choices=dict(text=list(text), label=list(labels)), answerKey='3')
def truths(choices, labels): return dict(mc2_targets=dict(choices=list(choices), labels=labels))


@pytest.mark.parametrize('task,change,says', [
    ('arc', labelled(1, 2, 3), 'the labels [1, 2, 3]; expected text'),
    ('arc', labelled('A', 'B', 3), "the labels ['A', 'B', 3]"),
    ('arc', labelled(True, False, '3'), 'expected text'),
    ('arc', labelled('1', '2', '3', text=['a', 'b', '\ud800']), "half a character in field 'choices.text'"),
    ('hellaswag', dict(endings=['c', '[step]', 'e', 'f']), "field 'endings' besides marks ('[step]')"),
    ('hellaswag', dict(endings=['c', 'd', 'e', '[a] [b]']), "besides marks ('[a] [b]')"),
    ('hellaswag', dict(endings=['c', 'd', 'e', '\udfff']), 'half a character'),
    ('mmlu', dict(subject='ana\x00tomy'), 'expected a name of MMLU'),
    ('mmlu', dict(subject='../../x'), "the subject '../../x'"),
    ('mmlu', dict(subject='x'*300), 'the subject'),
    ('truthfulqa', truths('aba', [1, 0, 0]), "'a' as a true choice and a false one"),
    ('truthfulqa', dict(mc1_targets=dict(choices=['a', 3], labels=[1, 0])), '3 in mc1_targets; expected text'),
    ('winogrande', dict(sentence='Ann saw _'), 'expected words after _'),
    ('winogrande', dict(sentence='Ann saw _ '), 'expected words after _'),
    *(('gsm8k', dict(answer=f'Five.\n#### {last}'), "'#### number'") for last in (
        '5 apples', '5%', '1/2', '10:30', '1 000', '1e5', '5\nMore text.', '\uff15', '5\u00b0', '+5', '5 ', '.', '-',
        '5\n#### six')),
])
def test_an_item_that_no_answer_could_be_right_for(tmp_path, task, change, says):
    path = published(tmp_path, task, ITEMS[task], ITEMS[task] | change)
    with pytest.raises(ValueError) as e: source_of(str(tmp_path)).items(task, 1)
    assert f'{path}: line 2 ' in str(e.value) and says in str(e.value)


@pytest.mark.parametrize('last', ['5', '-5', '1,000', '5.', '.5', '12.50', '0'])
def test_numbers_that_gsm8k_has(last): assert not item_problem('gsm8k', dict(answer=f'Five.\n#### {last}'))


@pytest.mark.parametrize('task,change', [
    ('arc', labelled('1', '2', '3', text=['2020-01-01', '2020-01-02', '2020-01-03'])),
    ('mmlu', dict(choices=['1914-07-28', '1914-07-29', '1914-07-30', '1914-07-31'])),
    ('winogrande', dict(option1='2020-01-01', option2='2020-01-02T10:00:00')),
])
def test_what_looks_like_a_date_is_asked_as_it_is_written(tmp_path, task, change):
    published(tmp_path, task, *[ITEMS[task] | change]*2)
    item = ITEMS[task] | change
    bench, _ = source_of(str(tmp_path)).items(task, 2)
    asked = by_item(build_requests(task, bench, 0, 'lm-eval'))[0]
    if task == 'mmlu': assert '\nA. 1914-07-28\nB. 1914-07-29\n' in asked[0].args[0]
    elif task == 'arc': assert [r.args[1].strip() for r in asked] == item['choices']['text']
    else: assert [item[k] in r.args[0] for k, r in zip(('option1', 'option2'), asked)] == [True, True]


def test_a_key_that_the_test_file_alone_has_is_not_read(tmp_path):
    more = ITEMS['arc'] | dict(choices=ITEMS['arc']['choices'] | dict(note='x'), id='7')
    published(tmp_path, 'arc', more, more)
    bench, _ = source_of(str(tmp_path)).items('arc', 2)
    assert bench['test'] == [ITEMS['arc']]*2
    assert len(build_requests('arc', bench, 1, 'lm-eval').tasks[0].instances) == 6


@pytest.mark.parametrize('change', [
    dict(chosen=['hello', dict(content='x')]), dict(chosen=[None, dict(role='assistant', content='x')]),
    dict(chosen=[dict(role=['a'], content='x'), dict(role='assistant', content='y')]),
    dict(rejected=[dict(role={}, content='y')]),
], ids=str)
def test_a_dialogue_that_is_none(tmp_path, change):
    row = dict(prompt='q', chosen=turns('yes'), rejected=turns('no'))
    path = in_folder(tmp_path, 'ultrafeedback', row, row | change)
    with pytest.raises(ValueError, match='expected messages, each with a role') as e:
        source_of(str(tmp_path)).rows('ultrafeedback_clean', 1, 0)
    assert f'{path}: line 2 ' in str(e.value)
    in_folder(tmp_path, 'ultrafeedback', row | dict(chosen={'-1': dict(content='x')}))
    with pytest.raises(ValueError, match="in field 'chosen'; expected list"):
        source_of(str(tmp_path)).rows('ultrafeedback_clean', 1, 0)


BIG = '1'*5000


def test_a_number_too_long_for_python_is_a_broken_line(tmp_path, capsys):
    path = in_folder(tmp_path, 'gsm8k/test', ITEMS['gsm8k'], json.dumps(ITEMS['gsm8k'])[:-1] + f', "n": {BIG}}}\n')
    with pytest.raises(ValueError, match=r'line 2 is no JSON \(too deep, or a number too long.*max_broken'):
        read_file(path, FILES['gsm8k/test'].fields)
    assert len(read_file(path, FILES['gsm8k/test'].fields, max_broken=1)) == 1 and '[2]' in capsys.readouterr().err
    path.write_text(f'{{"prompt": {BIG}}}\n')
    with pytest.raises(ValueError, match='line 1 is no JSON'): custom_fields(path)


def test_advice_on_a_broken_file_of_ones_own_is_what_can_be_done(tmp_path):
    (tmp_path/'mine.jsonl').write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(ValueError, match='line 2 is no JSON') as e: read_custom(tmp_path/'mine.jsonl')
    assert 'max_broken' not in str(e.value)


def test_a_flipped_byte_in_a_text_of_parquet(tmp_path):
    path = tmp_path/'x.parquet'
    table = pyarrow.table(dict(question=['hello wonderful'], answer=['#### 5']))
    pyarrow.parquet.write_table(table, path, compression='none', use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b'wonderful', b'w\xffnderful'))
    with pytest.raises(ValueError, match='is no whole parquet file'): read_file(path, FILES['gsm8k/test'].fields)


def test_problems_without_a_result_are_counted_where_they_stand_in(tmp_path):
    in_folder(tmp_path, 'math', *rows_of('math', 3), dict(problem='Why?', solution='By induction.'))
    in_folder(tmp_path, 'gsm8k/train', *rows_of('gsm8k/train', 2))
    got = source_of(str(tmp_path)).rows('synth_math_alignment', 2, 0)
    assert (got.n_found, got.rule) == (5, f'{STAND_IN}; 1 rows left out, without a bare result')
    assert source_of(str(tmp_path)).rows('synth_math_instruct', 2, 0).rule == STAND_IN


def test_choices_too_unlikely_for_a_float_have_a_score():
    "lm-eval's own TruthfulQA divides nothing by nothing where all choices are below e**-745."
    item = dict(question='What is it?', mc1_targets=dict(choices=['a', 'b'], labels=[1, 0]),
                mc2_targets=dict(choices=['a', 'b', 'c'], labels=[1, 0, 0]))
    asked = build_requests('truthfulqa', dict(train=[], test=[item]*2), 0, 'lm-eval')
    say = lambda requests, disable_tqdm: [(-760. if r.doc_id else -6., False) for r in requests]
    run_requests(SimpleNamespace(longest=len, max_length=99, loglikelihood=say), 'truthfulqa', asked)
    assert [r['score'] for r in collect('truthfulqa', asked)] == pytest.approx([1/3, 1/3])
