"""What `verify` catches, where a number comes from, what lm-eval can read, statistics against references, two seeds."""

import gzip
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from lm_eval.utils import make_table
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from solar_repro import paper, tables
from solar_repro.data import BENCHMARKS
from solar_repro.core.protocols import correct_2023, mean_of_groups
from solar_repro.core import stats as ours
from solar_repro.core.stats import mean_se
from solar_repro.core.config import load_profile
from solar_repro.reports.cli import main
from solar_repro.reports.verify import export_results, number, recounted, score_record, verify
from solar_repro.pipeline.experiment import Experiment
from solar_repro.core.files import content_hash, file_hash
from solar_repro.core.store import own_hash
from solar_repro.publishing.figures import figure
from solar_repro.publishing.text import printed, write_tables
from solar_repro.core.display import explore
from solar_repro.paper import h6_se, H6_TASKS

# ---- verify

@pytest.fixture(scope='module')
def whole(full, tmp_path_factory):
    "A full store, and the tables of its run. Read only."
    exp = Experiment('smoke', store=full)
    folder = tmp_path_factory.mktemp('tables')/'tables'
    write_tables(exp.scores(), folder, exp.label, exp.custom, exp.samples())
    return full, folder

@pytest.fixture
def mine(whole, tmp_path):
    "A full store and tables of one's own, to damage."
    for p, name in zip(whole, ('store', 'tables')): shutil.copytree(p, tmp_path/name)
    return tmp_path/'store', tmp_path/'tables'

def problems(store, folder): return verify(Experiment('smoke', store=store), folder)

def artifact(store, name): return Experiment('smoke', store=store).find(name).path

def forge(path):
    "Make a manifest agree with what its files now are, as one would who wants to be believed."
    file = path/'manifest.json'
    m = json.loads(file.read_text())
    for n in m['files']: m['files'][n] = dict(sha256=file_hash(path/n), bytes=(path/n).stat().st_size)
    m['content'] = content_hash(m['files'])
    m['sha256'] = own_hash(m)
    file.write_text(json.dumps(m, indent=1))

def put(file, change):
    "Change one record of an items file."
    items = pd.read_parquet(file).to_dict('records')
    change(items[1])
    pd.DataFrame(items).to_parquet(file, index=False)

def test_a_whole_run_has_no_fault(whole, monkeypatch):
    "And to see that, no model is loaded and nothing is built."
    import solar_repro.models.adapters
    from solar_repro.pipeline.builder import Builder        # what imports these names must have done so before
    from solar_repro.core.store import Store
    for module, name in (
        (solar_repro.models.adapters, 'materialize'),
        (Store, 'build'),
        (Builder, 'materialized'),
    ):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail('needed a model'))
    said, found = problems(*whole)
    assert found.empty, found.to_string()
    exp = Experiment('smoke', store=whole[0])
    n = 16*6*exp.profile.eval.n_items
    assert (
        f'{len(exp.graph)} artifacts' in said
        and f'{16*7} scores counted again from {n} answers' in said
        and '23 tables compared' in said
    )

def test_counted_again_are_the_scores_and_records_of_the_lab(whole):
    exp = Experiment('smoke', store=whole[0])
    scores, records, wrong = recounted(exp)
    assert wrong.empty
    pd.testing.assert_frame_equal(scores, exp.scores(), check_exact=True)
    both = [
        x.sort_values(['model', 'task', 'doc_id'], ignore_index=True)[['model', 'task', 'doc_id', 'score']]
        for x in (records, exp.samples())
    ]
    pd.testing.assert_frame_equal(*both, check_exact=True)

def change_score(path):
    s = json.loads((path/'score.json').read_text()); s['score'] += .01; s['protocols']['modern']['score'] += .01
    (path/'score.json').write_text(json.dumps(s))


def change_answer(path):
    put(
        path / 'items.parquet',
        lambda x: x.update(
            loglikelihoods=[-1e-9 if i != x['prediction'] else -99.0 for i in range(len(x['loglikelihoods']))]
        ),
    )


def change_item_score(path): put(path/'items.parquet', lambda x: x.update(score=1. - x['score']))
def change_question(path): put(path/'items.parquet', lambda x: x.update(asked='0'*64))


@pytest.mark.parametrize(
    'change, says',
    (
        (change_score, 'score'),
        (change_item_score, 'score of item 1'),
        (change_question, 'asked of item 1'),
        (change_answer, 'prediction of item 1'),
    ),
)
def test_a_changed_score_or_record_is_caught_even_with_its_hashes_redone(change, says, mine, capsys):
    store, folder = mine
    path = artifact(store, 'eval/DPO v2/arc')
    change(path)
    said, found = problems(store, folder)
    assert (
        found['where'].str.contains('DPO v2/arc').all()
        and len(found) == 1
        and found['what'][0] in ('score.json', 'items.parquet')
    )  # the hash
    forge(path)
    said, found = problems(store, folder)
    assert says in ' '.join(found['what']) and (found['where'] == 'eval/DPO v2/arc').all()
    assert main(['verify', '--profile', 'smoke', '--store', str(store)]) == 1
    assert 'DPO v2/arc' in capsys.readouterr().out

def test_a_changed_weight_file_is_caught_even_with_its_hashes_redone(mine, capsys):
    store, folder = mine
    path = artifact(store, 'SFT v3')
    file = path/'adapter'/'adapter_model.safetensors'
    data = bytearray(file.read_bytes()); data[-1] ^= 1; file.write_bytes(data)
    found = problems(store, folder)[1]
    assert (
        found['what'].tolist() == ['adapter/adapter_model.safetensors'] and found['where'].str.contains('SFT v3').all()
    )
    assert (
        main(['verify', '--profile', 'smoke', '--store', str(store)]) == 1
        and 'adapter_model.safetensors' in capsys.readouterr().out
    )
    forge(path)  # now the models made from it are of another adapter than the one that is there
    said, found = problems(store, folder)
    assert len(found) and (found['what'] == 'input SFT v3').all() and found['where'].str.contains('DPO v1').any()

def test_what_is_gone_or_cannot_be_read_is_caught(mine):
    store, folder = mine
    path = artifact(store, 'eval/Merge v1/gsm8k')
    kept = (path/'manifest.json').read_text()
    (path/'manifest.json').write_text(kept[:100])
    assert problems(store, folder)[1]['what'].tolist() == ['manifest.json']
    other = json.loads(kept.replace('"seed"', '"sede"').replace('"num_fewshot": 2', '"num_fewshot": 3'))
    for m in (other, {k: v for k, v in json.loads(kept).items() if k != 'sha256'}):      # not as it was written
        (path/'manifest.json').write_text(json.dumps(m))
        assert problems(store, folder)[1]['what'].tolist() == ['manifest.json']
    (path/'manifest.json').write_text(json.dumps(other | dict(sha256=own_hash(other))))
    assert 'key' in set(problems(store, folder)[1]['what'])      # other settings than those that it was made with
    shutil.rmtree(path)
    said, found = problems(store, folder)
    assert found['found'].str.contains('Merge v1').all() and len(found) == 23


def test_changed_tables_are_caught(mine):
    "One digit in each, all in one look."
    store, folder = mine
    at = {}
    for name in ('claims.csv', 'comparisons.csv', 'table3.csv', 'table5.md', 'table6.html', 'table7.tex'):
        lines = (folder/name).read_text().splitlines()
        k = at[name] = max(i for i, l in enumerate(lines) if re.search(r'\d\.\d', l))
        lines[k] = re.sub(r'(\d)\.(\d)', lambda m: f'{m[1]}.{(int(m[2]) + 1) % 10}', lines[k], count=1)
        (folder/name).write_text('\n'.join(lines) + '\n')
    found = problems(store, folder)[1]
    assert found['where'].tolist() == list(at) and found['what'].tolist() == [f'line {k + 1}' for k in at.values()]

def test_an_empty_store_has_nothing_to_differ_but_makes_no_table(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['verify', '--profile', 'smoke', '--store', str(tmp_path/'none')]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert f"nothing is built in {tmp_path/'none'}" in said             # of a name that was mistyped, say
    assert len(problems(tmp_path/'none', whole[1])[1]) == 23

def test_published_items_are_judged_as_lm_evals_own_tasks_ask_them(tmp_path):
    "lm-eval cleans HellaSwag's endings before it counts characters, and its TruthfulQA has no plainly worded answers."
    from test_sources import FILES, model_of, profile_of, put, rows_of
    for k, name in enumerate(FILES):
        rows = rows_of(name)
        if name.startswith('hellaswag'):
            rows = [
                r | dict(endings=[f'[header] {e} [title] on' * (j + 1) for j, e in enumerate(r['endings'])])
                for r in rows
            ]
        put(tmp_path/'data', name, rows, ('.jsonl', '.parquet')[k % 2])
    exp = Experiment(profile_of(tmp_path, model_of(tmp_path/'base'), tmp_path/'data'), store=tmp_path/'store')
    exp.run([f'eval/{m}/{t}' for m in ('base', 'SFT v4') for t in H6_TASKS])
    said, found = verify(exp, tmp_path/'none')
    assert found.empty and '12 scores counted again from 48 answers' in said, found.to_string()
    assert any('[' not in c for d in exp.requests('hellaswag')[0] for c in BENCHMARKS['hellaswag'].choices(d))
    for t in H6_TASKS:
        assert all(
            isinstance(x, str) for x in exp.flips('base', 'SFT v4', t)[['gold', 'base says', 'prompt']].to_numpy().flat
        )
    file = next(f for f in export_results(exp, tmp_path/'out', ['base']) if f.name.startswith('samples_hellaswag'))
    assert '[header]' not in json.loads(file.read_text().splitlines()[0])['arguments']['gen_args_0']['arg_1']
    path = exp.find('eval/base/hellaswag').path
    change_item_score(path); forge(path)
    assert 'score of item 1' in set(verify(exp, tmp_path/'none')[1]['what'])

# ---- one number, two models, lm-eval's files

def command(store, *words): return main([*words, '--profile', 'smoke', '--store', str(store)])

def test_show_prints_the_lineage_of_one_number(full, capsys):
    assert command(full, 'show', 'Merge v4', 'gsm8k') == 0
    out = capsys.readouterr().out
    exp = Experiment('smoke', store=full)
    s = exp.scores(['Merge v4']).set_index('task').loc['gsm8k']
    assert ' '.join(out.split()).startswith(
        f"Merge v4, gsm8k: {100*s['score']:.2f} % ± {100*s['se']:.2f} of {s['n']} items (exact_match, modern; smoke"
        " test, seed 0)"
    )
    for n in exp.needs(['eval/Merge v4/gsm8k']):
        assert re.search(rf'^ *{re.escape(n)}: ', out, re.M) and exp.show(n)['key'][:12] in out
    assert 'SFT v1' not in re.findall(r'^ *(.*?):', out, re.M) and 'num_fewshot 2' in out
    assert command(full, 'show', 'data/openorca', 'gsm8k') == 2 and 'is no model' in capsys.readouterr().err
    assert command(full, 'show', 'Merge v4', 'gsm9k') == 2 and "no benchmark 'gsm9k'" in capsys.readouterr().err

def test_one_number_builds_only_what_it_needs(tmp_path):
    exp = Experiment('smoke', store=tmp_path)
    number(exp, 'base', 'winogrande')
    assert {a.manifest['name'] for a in exp.store.entries()} == {'base', 'bench/winogrande', 'eval/base/winogrande'}

@pytest.mark.parametrize('task', H6_TASKS)
def test_flips_show_prompts_and_outputs(task, full, capsys):
    exp = Experiment('smoke', store=full)
    found, a, b = exp.flips('base', 'DPO v2', task), exp.items('base', task), exp.items('DPO v2', task)
    assert len(found) == (a['score'] != b['score']).sum() and found['change'].abs().is_monotonic_decreasing
    asked = exp.requests(task)[1]
    from solar_repro.eval import request_hash
    assert {i: request_hash(r) for i, r in asked.items()} == dict(
        zip(a['doc_id'], a['asked'])
    )  # the prompts that were asked
    for x in found.to_dict('records'):
        assert x['prompt'] == asked[x['doc_id']][0].args[0] and x['change'] == x['DPO v2'] - x['base'] != 0
        assert isinstance(x['gold'], str) and all(isinstance(x[f'{m} says'], str) for m in ('base', 'DPO v2'))
    assert command(full, 'diff', 'base', 'DPO v2', '--task', task) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f'{task}, smoke test, seed 0: {(found["change"] > 0).sum()} items for DPO v2, {(found["change"] < 0).sum()} for'
        ' base'
    )
    for x in found.to_dict('records'): assert x['prompt'] in out and f"item {x['doc_id']}\n" in out

def test_the_table_of_flips_is_a_page_of_its_own(full):
    "No file of anywhere else, all texts whole, sortable and filterable."
    exp = Experiment('smoke', store=full)
    found = exp.flips('base', 'DPO v2', 'truthfulqa')
    page = explore(found).html
    assert len(found) and not re.search(r'(?:src|href)\s*=|@import|https?://', page)
    assert '<script>' in page and 'type="search"' in page and page.count('<tr>') == len(found) + 1
    long = explore(found.assign(prompt=found['prompt'] + ' <x> & y'*60)).html
    assert long.count('<details>') == len(found) and ' &lt;x&gt; &amp; y' in long and '<x>' not in long

def strict(text): return json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))

def test_what_is_exported_is_lm_evals(full, tmp_path, capsys):
    exp, out = Experiment('smoke', store=full), tmp_path/'out'
    assert command(full, 'results', str(out)) == 0
    said = capsys.readouterr().out
    assert f'{16*7} files of 16 models' in ' '.join(said.split()) and len(said.splitlines()) < 6
    assert len(list(out.iterdir())) == 16
    folder = out/'SFT_v3_+_v4'
    (file,) = folder.glob('results_*.json')
    r = strict(file.read_text())
    s = exp.scores(['SFT v3 + v4']).set_index('task')
    for t in H6_TASKS:
        metric = s.loc[t, 'metric']
        assert (
            r['results'][t][f'{metric},none'] == s.loc[t, 'score']
            and r['results'][t][f'{metric}_stderr,none'] == s.loc[t, 'se']
        )
        (samples,) = folder.glob(f'samples_{t}_*.jsonl')
        lines = [strict(l) for l in samples.read_text().splitlines()]
        assert (
            np.mean([l[metric] for l in lines]) == pytest.approx(s.loc[t, 'score'])
            and len(lines) == r['n-samples'][t]['effective']
        )
        assert {'doc_id', 'doc', 'target', 'arguments', 'resps', 'filtered_resps', 'filter', 'metrics'} <= lines[
            0
        ].keys()
        assert len(lines[0]['arguments']) == len(lines[0]['resps']) and lines[0]['arguments']['gen_args_0']['arg_0']
    assert [l.split('|')[1].strip() for l in make_table(r).splitlines()[2:]] == sorted(
        H6_TASKS
    )  # lm-eval's own printer reads it
    assert command(full, 'results', str(out)) == 2 and 'holds files' in capsys.readouterr().err
    with pytest.raises(ValueError, match='is a file'): export_results(exp, file)

# ---- statistics

DARWIN = [
    49,
    -67,
    8,
    16,
    6,
    23,
    28,
    41,
    14,
    29,
    56,
    24,
    75,
    60,
    -48,
]  # cross- less self-fertilised maize, eighths of an inch

def test_a_t_test_gives_fishers_result():
    "The Design of Experiments (1935), section 17: t is 2.148 with 14 degrees of freedom, just beyond 2.145."
    x = np.array(DARWIN)/800
    got = ours.paired(.5 + x, np.full(15, .5))
    assert got.difference/got.se == pytest.approx(2.148, abs=5e-4) and got.df == pytest.approx(14)
    assert .049 < got.p < .05 and got.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)

def test_a_difference_by_rounding_alone_is_none():
    "Two merges that differ in the seventh digit of their shares, always to one side."
    rng = np.random.default_rng(0)
    a = {t: rng.random(80) if t == 'truthfulqa' else (rng.random(80) < .6).astype(float) for t in H6_TASKS}
    b = a | dict(truthfulqa=a['truthfulqa'] + 1e-7*rng.random(80))
    assert ours.paired_mean(a, b).p > .99

def test_mcnemar_on_agrestis_table():
    "Categorical Data Analysis, approval of the prime minister: 794, 150, 86, 570; z² is (86 - 150)²/(86 + 150)."
    a, b = [1]*794 + [1]*150 + [0]*86 + [0]*570, [1]*794 + [0]*150 + [1]*86 + [0]*570
    got = ours.paired(a, b)
    assert got.difference == pytest.approx(.04) and got.p == pytest.approx(stats.binomtest(86, 236).pvalue)
    assert got.p == pytest.approx(mcnemar([[794, 150], [86, 570]], exact=False, correction=False).pvalue, abs=2e-5)
    assert got.se == pytest.approx(.0095, abs=1e-4)            # the book's standard error of the difference

def pairs_of(both, first, second, neither):
    return [1.]*both + [1.]*first + [0.]*second + [0.]*neither, [1.]*both + [0.]*first + [1.]*second + [0.]*neither

def test_the_error_of_a_difference_is_bonetts_and_prices():
    "The example of the R package statpsych, ci.prop.ps(.05, 12, 4, 26, 6): 48 pairs, 26 and 4 unlike, 0.09448809."
    a, b = pairs_of(12, 26, 4, 6)
    assert ours.paired(a, b).se == pytest.approx(.09448809, abs=1e-8)
    d = np.array([*np.subtract(a, b), 1, -1])
    assert ours.difference_se(a, b) == pytest.approx(stats.sem(d, ddof=0))

@pytest.mark.parametrize('n', (2, 20, 400))
def test_no_difference_seen_is_not_known_to_be_none(n):
    "Alike on all n items: the true difference may still be what n items could miss one time in twenty, 3/n."
    a, b = pairs_of(n, 0, 0, 0)
    assert 2/n > ours.difference_se(a, b) > .7/n and ours.resolvable(ours.difference_se(a, b)) > 0
    six = dict.fromkeys(H6_TASKS, a)
    assert ours.paired_mean(six, six).se == pytest.approx(ours.difference_se(a, b)/math.sqrt(6))
    shares = np.linspace(.1, .9, n)
    assert ours.difference_se(shares, shares) == pytest.approx(math.sqrt(2)*stats.sem(shares))

def test_the_interval_of_a_difference_holds_what_it_should():
    "Two standard errors either way, against simulated models that agree on 97 of 100 items; a plain one may be 0."
    rng, n, p = np.random.default_rng(0), 60, (.02, .01)
    held = {}
    for k in range(3000):
        u = rng.random(n); d = (u < p[0]).astype(float) - (u > 1 - p[1])
        a, b = (d > 0).astype(float), (d < 0).astype(float)
        for name, se in (('ours', ours.difference_se(a, b)), ('plain', stats.sem(d))):
            held.setdefault(name, []).append(abs(d.mean() - (p[0] - p[1])) <= 2 * se)
    assert np.mean(held['ours']) > .94 > .9 > np.mean(held['plain'])

def test_errors_of_scores_against_scipy_and_statsmodels():
    xs = np.random.default_rng(0).random(50)
    assert mean_se(xs) == pytest.approx((xs.mean(), stats.sem(xs)))
    for right, n in ((0, 20), (20, 20), (10, 20), (3, 6), (1, 2)):
        low, high = proportion_confint(
            right, n, alpha=2 * stats.norm.sf(2), method='agresti_coull'
        )  # four items added: z = 2
        mean, se = mean_se([1.]*right + [0.]*(n - right))
        p = (right + 2)/(n + 4)
        assert mean == right/n and se >= math.sqrt(p*(1 - p)/(n + 4)) - 1e-12
        assert se == pytest.approx(max(stats.sem([1.]*right + [0.]*(n - right)), math.sqrt(p*(1 - p)/(n + 4))))
        if right in (0, n): assert 4*se == pytest.approx(high - low, rel=.01) or high in (0., 1.) or low == 0.
    xs, groups = [1., 0., 1., 1., 0., 0.], list('aabbbb')
    means = [np.mean(v) for v in ([1, 0], [1, 1, 0, 0])]
    assert mean_of_groups(xs, groups) == pytest.approx(
        (np.mean(means), math.hypot(stats.sem([1, 0]), stats.sem([1, 1, 0, 0])) / 2)
    )
    assert h6_se({t: .06 for t in H6_TASKS}) == pytest.approx(.06/math.sqrt(6))

def test_the_difference_of_h6_against_a_bootstrap():
    rng = np.random.default_rng(1)
    a, b = ({t: (rng.random(80) < .6).astype(float) for t in H6_TASKS} for _ in range(2))
    got = ours.paired_mean(a, b)
    d = np.array(
        [np.mean([x[rng.integers(80, size=80)].mean() for x in (a[t] - b[t] for t in H6_TASKS)]) for _ in range(2000)]
    )
    assert got.difference == pytest.approx(
        np.mean([a[t].mean() - b[t].mean() for t in H6_TASKS])
    ) and got.se == pytest.approx(d.std(), rel=0.1)
    assert got.p == pytest.approx(
        2 * stats.norm.sf(abs(got.difference) / got.se), abs=0.06
    )  # sums of whole items: a step is some hundredths

def test_benchmarks_of_unlike_size_count_alike_in_h6():
    one = {t: np.array([1., 0.]*5) for t in H6_TASKS}
    two = one | dict(arc=np.array([1., 1.]*50))
    with pytest.raises(ValueError, match='as many of each'): ours.paired_mean(one, two)
    big = {t: np.tile(x, 10) if t == 'arc' else x for t, x in one.items()}
    more = big | dict(arc=np.ones(100))
    assert ours.paired_mean(more, big).difference == pytest.approx(.5/6)

@pytest.mark.parametrize('bad', ([], [1.]))
def test_one_item_makes_no_test(bad):
    with pytest.raises(ValueError, match='two or more'): ours.paired(bad, bad)

def test_what_can_be_resolved_is_found_four_times_in_five():
    "Against simulated experiments with the difference that is said to be resolvable."
    rng, n, sd = np.random.default_rng(0), 200, .5
    d = ours.resolvable(sd/math.sqrt(n))
    found = [stats.ttest_1samp(rng.normal(d, sd, n), 0).pvalue < .05 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(.8, abs=.04)

def test_the_two_noises_are_told_apart():
    "Invented runs: the items have one known error, trainings scatter by another."
    rng = np.random.default_rng(0)
    frame = lambda seed: pd.DataFrame(
        [dict(model=m, task='arc', score=0.6 + 0.05 * rng.normal(), se=0.02) for m in map(str, range(300))]
    )
    x = ours.item_and_training_noise({s: frame(s) for s in range(5)})
    assert (
        x['item_se'].to_numpy() == pytest.approx(0.02)
        and (x['training_sd'] ** 2).mean() ** 0.5 == pytest.approx(0.05, rel=0.06)
        and (x['seeds'] == 5).all()
    )

def test_the_papers_scores_have_binomial_errors():
    s = tables.paper_scores()
    n = dict(arc=1172, hellaswag=10042, mmlu=14042, winogrande=1267, gsm8k=1319)
    for t, k in n.items():
        p = s.loc[('SFT v3', t), 'score']
        low, high = proportion_confint(p*k, k, alpha=2*stats.norm.sf(1), method='normal')
        assert s.loc[('SFT v3', t), 'se'] == pytest.approx((high - low)/2, rel=1e-3)
    six = [s.loc[('SFT v3', t), 'se'] for t in H6_TASKS]
    assert (
        s.loc[('SFT v3', 'h6'), 'se'] == pytest.approx(np.linalg.norm(six) / 6)
        and 0.003 < s.loc[('SFT v3', 'h6'), 'se'] < 0.006
    )

def test_a_claim_on_the_paper_is_judged_by_those_errors():
    s, c = tables.paper_scores(), paper.CLAIMS[0]
    task, a, op, b = c.parts[0]
    d = s.loc[(a, task), 'score'] - s.loc[(b, task), 'score']
    se = math.hypot(s.loc[(a, task), 'se'], s.loc[(b, task), 'se'])
    fake = pd.DataFrame([dict(model=m, task=t, score=.5, se=.01) for m in s.index.unique('model') for t in H6_TASKS])
    row = tables.claims(fake, [c]).iloc[0]
    assert row['paper_parts'][0] == tables.judge(op, d, se) and f'{100*d:+.2f} ± {100*se:.2f}' in row['paper_numbers']

# ---- marks


def items_of(scores):
    return pd.DataFrame(
        [
            dict(model=m, task=t, doc_id=i, score=float(x))
            for m, xs in scores.items()
            for t in H6_TASKS
            for i, x in enumerate(xs)
        ]
    )


def scores_of(records):
    return (
        records.groupby(['model', 'task'], sort=False)['score']
        .agg(score='mean', se='sem')
        .reset_index()
        .assign(metric='acc', n=10)
    )


def test_best_is_marked_where_it_is_not_resolved():
    names, n = paper.models(7), 40
    far = items_of({m: [1]*(30 if k == 0 else 10) + [0]*(10 if k == 0 else 30) for k, m in enumerate(names)})
    close = items_of({m: [1]*30 + [0]*10 if k == 0 else [0]*11 + [1]*29 for k, m in enumerate(names)})
    tie = items_of({m: ([1]*20 + [0]*20)[::1 if k % 2 else -1] for k, m in enumerate(names)})
    for records, marked, bold in ((far, 0, 1), (close, 1, 1), (tie, 4, 4)):
        shown = printed(7, scores_of(records), 'md', samples=records)
        for t in map(paper.TITLES.get, ('h6', 'arc', 'gsm8k')):
            cells = shown[t].str.split('(').str[0]
            assert cells.str.contains('≈').sum() == marked and cells.str.startswith('**').sum() == bold

def test_a_title_and_the_marks_below_it_say_the_same():
    "H6 of two models that agree on most items: far apart for a paired test, close by their own errors."
    names, n = paper.models(7), 60
    right = dict(zip(names, (40, 36, 30, 29)))
    records = items_of({m: [1]*k + [0]*(n - k) for m, k in right.items()})
    t = tables.table(7, scores_of(records))
    assert f'{names[0]} has the highest H6 (66.7) and is ahead of {names[1]} (+6.7 ±' in tables.finding(
        7, t, 'x', records
    )
    assert 'h6' not in tables.unresolved(t, records) and 'is not resolved from' in tables.finding(7, t, 'x')
    fig = figure(7, scores_of(records), 'x', samples=records)
    assert 'is ahead of' in fig._suptitle.get_text(); plt.close(fig)
    close = items_of(
        {m: [1] * (40 if k == 0 else 39) + [0] * (20 if k == 0 else 21) for k, m in enumerate(names)}
    ).query('task == "arc" or model != @names[0]')
    close = pd.concat([close, items_of({names[0]: [1]*39 + [0]*21}).query('task != "arc"')])
    t = tables.table(7, scores_of(close))
    assert 'h6' in tables.unresolved(t, close) and 'is not resolved from' in tables.finding(7, t, 'x', close)

def test_comparisons_are_corrected_over_their_table(full):
    records = Experiment('smoke', store=full).samples()
    found = tables.answers(records)
    for n in range(3, 8):
        c, pairs = tables.comparisons(n, records), tables.compared(n)
        tested = [tables.pair(found, *x) for x in pairs]
        assert [math.isinf(x.df) for x in tested] == [task not in ('h6', 'truthfulqa') for task, *_ in pairs]
        quantiles = np.array([stats.t.isf(.025, x.df) + stats.t.isf(.2, x.df) for x in tested])
        assert c['resolvable'].to_numpy() == pytest.approx(quantiles*c['se'].to_numpy())
        assert c['p_holm'].to_numpy() == pytest.approx(multipletests(c['p'], method='holm')[1])
        assert len(c) == len(pairs) and not c.isna().any().any()
    for x in tables.compared(7): assert x[0] == 'h6' or x[0] in H6_TASKS

def test_every_claim_has_its_paired_test():
    tested = {(t, frozenset((a, b))) for n in range(3, 8) for t, a, b in tables.compared(n)}
    assert {(t, frozenset((a, b))) for c in paper.CLAIMS for t, a, _, b in c.parts} <= tested

# ---- protocols

def test_the_difference_of_protocols_is_that_of_their_rules(full):
    exp = Experiment('smoke', store=full)
    both = exp.protocols().set_index(['model', 'task'])
    for m in exp.models:
        x = exp.items(m, 'gsm8k')
        assert both.loc[(m, 'gsm8k'), 'leaderboard-2023'] == np.mean(
            [correct_2023(t, g) for t, g in zip(x['text'], x['gold'])]
        )
        x = exp.items(m, 'mmlu')
        assert (
            both.loc[(m, 'mmlu'), 'leaderboard-2023'] == pytest.approx(x.groupby('subject')['score'].mean().mean())
            and both.loc[(m, 'mmlu'), 'modern'] == x['score'].mean()
        )
        for t in ('arc', 'hellaswag', 'truthfulqa', 'winogrande'):
            assert both.loc[(m, t), 'modern'] == both.loc[(m, t), 'leaderboard-2023']

# ---- seeds

def test_two_seeds_end_in_tables_that_show_both_noises(full, tmp_path):
    "The second seed's scores are made up; that a run trains twice, the slow test below shows."
    exp = Experiment('smoke', store=full)
    one, records = exp.scores(), exp.samples()
    runs = {0: one, 1: one.assign(score=(one['score'] + .1).clip(upper=1))}
    both = pd.concat([records.assign(seed=s) for s in runs], ignore_index=True)
    write_tables(tables.over_seeds(runs), tmp_path, exp.label, exp.custom, both)
    noise = pd.read_csv(tmp_path/'noise.csv').set_index(['model', 'task'])
    x = {s: tables.with_h6(r) for s, r in runs.items()}
    for key in (('Merge v4', 'h6'), ('SFT v1', 'gsm8k'), ('DPO v2', 'truthfulqa')):
        a, b = (100*f.loc[key, 'score'] for f in x.values())
        assert noise.loc[key, 'training_sd'] == pytest.approx(abs(a - b)/math.sqrt(2), rel=1e-3)
    assert 'over items and 2 trainings' in (tmp_path/'table3.md').read_text()


@pytest.mark.slow
def test_seeds_of_a_profile_end_in_tables_that_show_both_noises(full, tmp_path, monkeypatch, capsys):
    store, project = shutil.copytree(full, tmp_path/'store'), tmp_path/'project'
    project.mkdir(); monkeypatch.chdir(project)
    (project/'two.toml').write_text('extends = "smoke"\nname = "two"\nseeds = [0, 1]\n')
    words = ['--profile', 'two.toml', '--store', str(store)]
    assert main(['run', *words]) == 0
    labs = Experiment('two.toml', store=store).repeated()
    runs = {s: l.scores() for s, l in labs.items()}
    assert list(labs) == [0, 1] and {
        a.manifest['seed'] for a in labs[0].store.entries() if a.kind in ('sft', 'dpo')
    } == {0, 1}
    out = project/'runs'/'two'
    noise = pd.read_csv(out/'tables'/'noise.csv').set_index(['model', 'task'])
    x = {s: tables.with_h6(r) for s, r in runs.items()}
    for key in (('Merge v4', 'h6'), ('SFT v1', 'gsm8k'), ('DPO v2', 'truthfulqa')):
        one, two = (100*f.loc[key] for f in x.values())
        assert noise.loc[key, 'training_sd'] == pytest.approx(abs(one['score'] - two['score'])/math.sqrt(2), rel=1e-3)
        assert noise.loc[key, 'item_se'] == pytest.approx(math.sqrt((one['se']**2 + two['se']**2)/2), rel=1e-3)
    row = next(l for l in (out/'tables'/'table3.md').read_text().splitlines() if l.startswith('| SFT v1'))
    one, two = (100*f.loc[('SFT v1', 'truthfulqa')] for f in x.values())
    mean = (one['score'] + two['score'])/2
    se = math.hypot(*noise.loc[('SFT v1', 'truthfulqa'), ['item_se', 'training_sd']]
                                                           / [1, math.sqrt(2)])
    assert f'{mean:.2f}' in row and f'± {se:.1f}' in row
    assert 'over items and 2 trainings' in (out/'tables'/'table3.md').read_text()
    page = (out/'report.html').read_text()
    assert 'Item noise and training noise' in page and '2 seeds: provisional' in page and 'seeds 0, 1' in page
    capsys.readouterr()
    assert main(['verify', *words]) == 0
    said = ' '.join(capsys.readouterr().out.split())             # lines are broken to fit a terminal
    assert '24 tables compared' in said and f'{2*16*7} scores' in said
    text = (out/'tables'/'noise.csv').read_text()
    (out/'tables'/'noise.csv').write_text(text.replace(',2\n', ',3\n', 1))
    assert main(['verify', *words]) == 1 and 'noise.csv' in capsys.readouterr().out


@pytest.mark.parametrize('task', [t for t in H6_TASKS if t != 'gsm8k'])
def test_every_benchmark_names_its_choices(task):
    "One was once lost behind a comment."
    from solar_repro.stages.sources import TinyWorld
    found = BENCHMARKS[task].choices(TinyWorld().items(task, 2)[0]['test'][0])
    assert len(found) > 1 and all(isinstance(c, str) and c for c in found)


def test_one_score_is_of_one_training(full, tmp_path):
    "Of a profile with several seeds a single score, and the scores beside answers, are those of one of them."
    two = load_profile('smoke').model_copy(update=dict(seeds=[0, 1]))
    exp = Experiment(two, store=full)
    assert exp.label.endswith('seeds 0, 1') and score_record(exp, 'base', 'arc')['label'].endswith('seed 0')
    kept = json.loads(export_results(exp, tmp_path/'out', ['base'])[0].read_text())
    assert kept['label'].endswith('seed 0') and 'h6' not in kept['results']


# ---- what came with the package

def test_records_are_checked_answer_by_answer(full, tmp_path, monkeypatch):
    "A record that follows from its answers passes; a score, a choice and an item that were changed are named."
    from solar_repro.pipeline import results
    from solar_repro.reports.verify import record_problems
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]/'tools'))
    from record_run import record
    exp, good = Experiment('smoke', store=full), record('smoke', 0, full, tmp_path, 'cpu')
    monkeypatch.setattr(results, 'RECORDED', tmp_path)
    n, problems = record_problems(exp)
    assert n == 1 and problems.empty, problems.head().to_string()
    x = json.loads(gzip.decompress(good.read_bytes()))
    x['results']['SFT v1']['arc']['items']['score'][2] = 1 - x['results']['SFT v1']['arc']['items']['score'][2]
    x['results']['DPO v1']['gsm8k']['items']['text'][1] = '#### 12345'
    x['tasks']['mmlu']['asked'] = '0'*64
    bad = tmp_path/'smoke'/'other'/'seed1.json.gz'
    bad.parent.mkdir()
    bad.write_bytes(gzip.compress(json.dumps(x | dict(seed=1)).encode()))
    n, problems = record_problems(exp)
    assert n == 2 and set(problems['where'].str.split(', ').str[0]) == {'recorded other'}
    found = set(zip(problems['where'].str.split('seed 1, ').str[1], problems['what']))
    assert {('SFT v1/arc', 'score of item 2'), ('SFT v1/arc', 'score'), ('base/mmlu', 'items')} <= found
    assert {w for w, _ in found} <= {'SFT v1/arc', 'DPO v1/gsm8k', *(f'{m}/mmlu' for m in exp.models)}
    rows = exp.profile.data.model_copy(update=dict(source='published'))     # of which others may have asked other items
    exp.profile = exp.profile.model_copy(update=dict(data=rows))
    n, problems = record_problems(exp)
    assert n == 2 and not any(problems['where'].str.endswith('/mmlu')) and any(problems['where'].str.endswith('/arc'))
