"Adding something is one place: what CONTRIBUTING says is done in a copy of the package, and runs at smoke scale."
import shutil
from pathlib import Path

import nbformat
import pytest
from forked import forked

ROOT = Path(__file__).resolve().parents[1]

SET = '''
def from_pairs(row): return dict(prompt=row['ask'].strip(), completion=row['say'].strip())

def _row_opposites(rng, world):
    a, b = rng.choice((('up', 'down'), ('hot', 'cold'), ('old', 'new')))
    return dict(ask=f'What is the opposite of {a}?', say=f'{b}.')

OPPOSITES = File('opposites', 'me/opposites', (None,), 'train', 'a'*40, 'MIT', 'opposites', _STEMS,
                 dict(ask=str, say=str))
'''
SET_ENTRY = '''    opposites=DataSet(
        'Opposites', 'instruction', 'a word and its opposite', 3, 3, (OPPOSITES,), _each(from_pairs),
        Lengths(3, 12., 1., (12,)*21, 'counted by hand'), 1e3, tiny=_row_opposites),
'''
BENCH = '''
def _items_directions(world, n, seed):
    rng = random.Random(f'directions {seed}')
    def item(i): return dict(question=f'Where is thing {i}?', options=['up', 'down'], right=rng.choice(('up', 'down')))
    return dict(train=[item(i) for i in range(100, 110)], test=[item(i) for i in range(n)])

def _items_doubles(world, n, seed):
    def item(i): return dict(ask=f'Twice {i}?', say=str(2*i))
    return dict(train=[item(i) for i in range(100, 110)], test=[item(i) for i in range(n)])

def _judge_doubles(item, text):
    said = (text.split() or ['[invalid]'])[0]
    return dict(gold=item['say'], prediction=said, score=float(said == item['say']))
'''
BENCH_ENTRY = '''    directions=Benchmark(
        'Directions', 'acc',
        bench_files('directions', 'me/directions', None, 'b'*40, 'MIT', 'directions',
                    dict(question=str, options=list, right=str), train=('train', 'train'), test=('test', 'test')),
        '', ItemSizes(100, 10, 8, 2, 0), 1e3, choices=lambda item: item['options'], answer='right',
        answers=lambda item: item['options'], tiny=_items_directions, leaks=lambda item: [item['question']]),
    doubles=Benchmark(
        'Doubles', 'exact_match',
        bench_files('doubles', 'me/doubles', None, 'b'*40, 'MIT', 'doubles', dict(ask=str, say=str),
                    train=('train', 'train'), test=('test', 'test')),
        '', ItemSizes(100, 10, 8, 0, 4), 1e3, judge=_judge_doubles, text=lambda item: item['ask'],
        tiny=_items_doubles, leaks=lambda item: [item['ask']]),
'''
TASK = '''task: tiny_directions
dataset_path: json
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{options.index(right)}}"
doc_to_choice: "{{options}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
'''
GENERATED = '''task: tiny_doubles
dataset_path: json
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Question: {{ask}}\\nAnswer:"
doc_to_target: "{{say}}"
generation_kwargs:
  until: ["Question:"]
  do_sample: false
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: first-word
    filter:
      - function: regex
        regex_pattern: "(\\\\S+)"
      - function: take_first
metadata:
  version: 1.0
'''

METHOD = '''
def swapped(x): return tuple(reversed(x.weight))
'''
METHOD_ENTRY = """    swapped=Method(('weight',), weigh=swapped, n_models=(2, 2), of_adapters=True, in_rows=True),
"""


@pytest.fixture
def package(tmp_path):
    "A copy of the package, without its tests and notebooks."
    shutil.copytree(ROOT/'solar_repro', tmp_path/'solar_repro', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    return tmp_path


def add(package: Path, module: str, before: str, functions: str, entry: str) -> None:
    "Functions in front of a registry of a module, and one entry at its beginning."
    path = package/'solar_repro'/module
    text = path.read_text(encoding='utf-8')
    assert text.count(f'\n{before} = dict(\n') == 1
    head, rest = text.split(f'\n{before} = dict(\n')
    path.write_text(f'{head}\n{functions}\n{before} = dict(\n{entry}{rest}', encoding='utf-8')


def run(package: Path, profile: str, code: str) -> None:
    "Python in the copy; `exp` is the run of the profile."
    (package/'mine.toml').write_text(f'extends = "smoke"\n{profile}')
    head = ('from pathlib import Path\nfrom solar_repro.pipeline.experiment import Experiment\n'
            'exp = Experiment("mine.toml", store=Path("store"))\n')
    got = forked(head + code, cwd=package, env=dict(PYTHONPATH=str(package)))
    assert got.returncode == 0, got.stderr[-3000:]


def test_a_training_set_is_one_entry(package):
    add(package, 'data.py', 'SETS', SET, SET_ENTRY)
    run(package, '[data.rows]\nopposites = 8\n[sft]\nwarmup_ratio = 0\n[rows."SFT v5"]\nsets = ["opposites"]\n', '''
import solar_repro
assert solar_repro.__file__.startswith(str(Path.cwd())), solar_repro.__file__
from solar_repro.data import FILES
from solar_repro.planning.plan import make_plan
rows = exp.rows('data/opposites')
assert len(rows) == 8 and all(r['prompt'].startswith('What is the opposite') for r in rows), rows
assert len(exp.log('SFT v5')) and 'data/opposites' in exp.graph['contamination'].inputs
assert FILES['opposites'].licence == 'MIT'
assert 'data/opposites' in set(make_plan(exp.profile, exp.graph).stages['stage'])
''')


def add_benchmarks(package: Path) -> None:
    "One with choices, one whose answers are generated."
    add(package, 'data.py', 'BENCHMARKS', BENCH, BENCH_ENTRY)
    for name, text in dict(directions=TASK, doubles=GENERATED).items():
        (package/'solar_repro'/'tasks'/f'{name}.yaml').write_text(text)


def test_a_benchmark_is_one_entry_and_its_task_file(package):
    add_benchmarks(package)
    run(package, '[eval.num_fewshot]\ndirections = 2\ndoubles = 2\n', '''
from solar_repro.paper import H6_TASKS
from solar_repro.reports.verify import judged
from solar_repro.tables import with_h6
assert sorted(exp.tasks) == sorted([*H6_TASKS, 'directions', 'doubles']) and 'directions' not in H6_TASKS
s = exp.scores(['base'])
assert set(s['task']) == {*exp.tasks, 'truthfulqa_plain'}
six = s.set_index('task')['score'].drop('truthfulqa_plain').to_dict()
h6 = with_h6(s).loc[('base', 'h6'), 'score']
assert abs(h6 - sum(six[t] for t in H6_TASKS)/6) < 1e-9   # a seventh is shown, not counted
for task in ('directions', 'doubles'):
    docs, _ = exp.requests(task)
    for x in exp.items('base', task).to_dict('records'):
        again = judged(task, docs[x['doc_id']], x)
        assert again == {k: x[k] for k in ('gold', 'prediction', 'score')}, (again, x)
    assert f'bench/{task}' in exp.graph['contamination'].inputs
''')


def test_the_page_of_the_data_holds_with_further_entries(package):
    "The notebook that the entries stand in, with a set and a benchmark more."
    nb = nbformat.read(ROOT/'nbs'/'01_data.ipynb', 4)
    for before, functions, entry in (('SETS', SET, SET_ENTRY), ('BENCHMARKS', BENCH, BENCH_ENTRY)):
        add(package, 'data.py', before, functions, entry)
        cell, = (c for c in nb.cells if f'\n{before} = dict(\n' in c.source)
        cell.source = cell.source.replace(f'\n{before} = dict(\n', f'\n{functions}\n{before} = dict(\n{entry}')
    for name, text in dict(directions=TASK, doubles=GENERATED).items():
        (package/'solar_repro'/'tasks'/f'{name}.yaml').write_text(text)
    (package/'nbs').mkdir()
    nbformat.write(nb, package/'nbs'/'01_data.ipynb')
    env = dict(PYTHONPATH=str(package), SOLAR_STORE=str(package/'store'), SOLAR_PROFILE='smoke')
    done = forked("""
from pathlib import Path
from nbdev.test import test_nb
assert test_nb(Path('01_data.ipynb').resolve(), do_print=True)[0]
""", env=env, cwd=package/'nbs')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_merge_method_is_one_entry(package):
    "Each model gets the other's weight; of adapters that is an adapter."
    add(package, 'merging/methods.py', 'METHODS', METHOD, METHOD_ENTRY)
    run(package, '[rows."Mine"]\nweights = {"SFT v1" = 0.2, "SFT v4" = 0.8}\nmethod = "swapped"\n', '''
assert exp.graph['Mine'].settings == dict(method='swapped', weights=[.2, .8]), exp.graph['Mine'].settings
merged = exp.model('Mine')
parts = {n: exp.model(n).adapters[0][0] for n in ('SFT v1', 'SFT v4')}
assert dict(merged.adapters) == {parts['SFT v1']: .8, parts['SFT v4']: .2}, merged.adapters
from solar_repro.planning.plan import make_plan
planned = make_plan(exp.profile, exp.graph).stages.set_index('stage')['disk_gib']
assert planned['Mine'] == planned['Merge v1'], 'a sum of adapters takes no room'
from solar_repro.reports.cli import main
folders = [str(parts[n]) for n in ('SFT v1', 'SFT v4')]
assert main(['merge', '--method', 'swapped', '--weights', '0.2,0.8', *folders, 'out']) == 0
from solar_repro.models.adapters import deltas
one, two = deltas([(Path(folders[0]), .8), (Path(folders[1]), .2)]), deltas([(Path('out'), 1.)])
for name, parts in one.items():
    a, b = (sum(f*B@A for f, A, B in x) for x in (parts, two[name]))
    assert (a - b).abs().max() < 1e-5*a.abs().max(), name
''')


def test_the_shipped_profiles_ask_the_papers_six():
    from solar_repro.core.config import load_profile, profiles
    from solar_repro.paper import H6_TASKS
    from solar_repro.stages.graph import benchmarks
    for name in profiles(): assert tuple(benchmarks(load_profile(name))) == H6_TASKS


@pytest.mark.parametrize('text,says', [
    ('[data.rows]\nopenroca = 4\n', "data.rows names the training set 'openroca'; did you mean 'openorca'"),
    ('[eval.num_fewshot]\nmmul = 4\n', "eval.num_fewshot names the benchmark 'mmul'; did you mean 'mmlu'"),
    ('[eval.num_fewshot]\nmmlu = 6\n', 'eval.num_fewshot.mmlu is 6; expected at most 5')])
def test_names_in_a_profile_are_those_of_entries(tmp_path, text, says):
    from solar_repro.core.config import load_profile
    from solar_repro.stages.graph import build_graph
    (tmp_path/'mine.toml').write_text(f'extends = "smoke"\n{text}')
    with pytest.raises(ValueError, match=says): build_graph(load_profile(tmp_path/'mine.toml'))
