"Tables 3 to 7: what the paper prints, and what is printed beside it."
import csv
import errno
import json
import math
import operator
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from solar_repro import paper, tables
from solar_repro.pipeline.experiment import Experiment
from solar_repro.publishing.figures import claims_figure, figure
from solar_repro.publishing.report import publish, Run, summary
from solar_repro.publishing.text import printed

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (d / 'shared' / 'paper-section-4.3.md' for d in ROOT.parents)
PAPER_TEXT = next((p for p in TEXTS if p.exists()), None)    # no part of the project
needs_text = pytest.mark.skipif(not PAPER_TEXT, reason="shared/paper-section-4.3.md is not beside the project")
TASKS = ['h6', 'arc', 'hellaswag', 'mmlu', 'truthfulqa', 'winogrande', 'gsm8k']
TITLES = ['H6 (Avg.)', 'ARC', 'HellaSwag', 'MMLU', 'TruthfulQA', 'Winogrande', 'GSM8K']
COUNTS = {3: 5, 4: 3, 5: 2, 6: 2, 7: 4}
MODELS = ['SFT v1', 'SFT v2', 'SFT v3', 'SFT v4', 'SFT v3 + v4', 'DPO v1', 'DPO v2', 'DPO v1 + v2', 'DPO v3',
          'Cand. 1', 'Cand. 2', 'Merge v1', 'Merge v2', 'Merge v3', 'Merge v4']


def frame(score=.5, se=.05, models=MODELS, plain=False, **changed) -> pd.DataFrame:
    "A tidy frame with the same score everywhere; `changed` is {'MODEL|task': score}."
    at = {tuple(k.split('|')): v for k, v in changed.items()}
    tasks = TASKS[1:] + ['truthfulqa_plain']*plain
    return pd.DataFrame([dict(model=m, task=t, metric='acc', score=at.get((m, t), score), se=se, n=100)
                         for m in models for t in tasks])


# ---- the paper

def printed_tables() -> dict[int, list[dict[str, str]]]:
    "The tables in the paper's text: number -> rows of {heading: cell}. The number stands in the caption below."
    found, rows = {}, []
    for line in PAPER_TEXT.read_text(encoding='utf-8').splitlines():
        if line.startswith('|'): rows.append([c.strip() for c in line.strip().strip('|').split('|')])
        caption = re.match(r'Table (\d):', line)
        if caption:
            head, _, *body = rows
            found[int(caption[1])] = [dict(zip(head, r, strict=True)) for r in body]
            rows = []
    return found


@needs_text
def test_the_paper_is_entered_as_printed():
    text = printed_tables()
    assert {n: len(rows) for n, rows in text.items()} == COUNTS
    for n, rows in text.items():
        ours = [r for r in paper.ROWS if r.table == n]
        assert [r.model for r in ours] == [r['Model'] for r in rows]
        for a, b in zip(ours, rows, strict=True):
            cells = [b[t] for t in TITLES]
            plain = [c.removeprefix('<b>').removesuffix('</b>') for c in cells]
            assert [f'{x:.2f}' for x in a.scores] == plain, a.model
            assert a.bold == {t for t, c in zip(TASKS, cells) if c.startswith('<b>')}, a.model
            assert dict(a.made) == {h: v for h, v in b.items() if h not in ('Model', *TITLES)}, a.model


def of_the_page(name: str) -> dict:
    "What a cell of the paper's notebook defines that is no part of the library; it begins with this name."
    cells = json.loads((ROOT/'nbs'/'00_paper.ipynb').read_text(encoding='utf-8'))['cells']
    code, = (text for c in cells if (text := ''.join(c['source'])).startswith(f'{name} = '))
    space = vars(paper) | dict(operator=operator)
    exec(code, space)
    return space


@needs_text
def test_what_is_quoted_stands_in_the_text():
    flat = lambda s: re.sub(r'\s+', ' ', re.sub(r"[‘’'\"“”]", '', s))
    text = flat(re.sub(r'^(\|.*|Table \d:.*)\n', '', PAPER_TEXT.read_text(encoding='utf-8'), flags=re.M))
    wrong = [(c.name, part) for c in paper.CLAIMS for part in c.quote.split(' ... ') if flat(part) not in text]
    page = of_the_page('SENTENCES')
    wrong += [quote for quote, _ in (*page['SENTENCES'], page['STRENGTHS']) if flat(quote) not in text]
    assert not wrong
    in_text = set(re.findall(r'\d+\.\d\d', text))
    assert {f'{x:.2f}' for *_, x in of_the_page('TYPED')['TYPED']} == in_text  # each such number is checked


@needs_text
def test_merge_weights_stand_in_table_7():
    text = {r['Model']: r['Merge Method'] for r in printed_tables()[7]}
    weights = {m: paper.origin(m).weights for m in paper.MODELS if paper.origin(m).weights}
    for m, w in weights.items():
        if m in text: assert text[m] == f'Average {w}'
    assert {m for m in text if m not in weights} == {'Merge v4'}


def test_rows_are_named_as_everywhere():
    assert [m for m in dict.fromkeys(r.model for r in paper.ROWS)] == MODELS == list(paper.MODELS)
    assert {n: len(paper.models(n)) for n in COUNTS} == COUNTS
    assert list(paper.TITLES.values()) == TITLES and list(paper.TITLES) == TASKS == ['h6', *paper.H6_TASKS]
    assert len(paper.scores()) == 7*16                       # DPO v2 stands in two tables


def test_at_least_ten_claims_each_of_rows_and_scores_that_exist():
    assert len(paper.CLAIMS) >= 10 and len({c.name for c in paper.CLAIMS}) == len(paper.CLAIMS)
    for c in paper.CLAIMS:
        assert c.parts
        for task, a, op, b in c.parts:
            assert task in TASKS and {a, b} <= set(MODELS) and a != b and op in '><≈≥'


# ---- H6 by hand

def test_h6_and_its_error_in_a_table():
    s = frame(models=['Cand. 1', 'Cand. 2'])
    s.loc[s['model'] == 'Cand. 1', 'score'] = [.1, .2, .3, .4, .5, .9]
    s.loc[s['model'] == 'Cand. 1', 'se'] = [.01, .02, .02, .04, .06, .08]
    t = tables.table(6, s).set_index('model')
    assert t.loc['Cand. 1', 'h6'] == 40.00                   # 2.4 / 6
    assert t.loc['Cand. 1', 'h6_se'] == 1.86                 # sqrt(1+4+4+16+36+64) / 6 = sqrt(125)/6 = 1.8634
    assert t.loc['Cand. 2', 'h6_se'] == 2.04                 # 5/sqrt 6
    assert list(t.loc['Cand. 1', TASKS[1:]]) == [10, 20, 30, 40, 50, 90]
    assert list(t.loc['Cand. 2', [f'{x}_paper' for x in TASKS]]) == [73.28, 71.59, 88.39, 66.14, 72.50, 81.99, 59.14]


# ---- tables

@pytest.mark.parametrize('plain', [False, True])
@pytest.mark.parametrize('n', COUNTS)
def test_columns_and_rows(n, plain):
    t = tables.table(n, frame(plain=plain))
    want = ['model', *TASKS, *(f'{x}_se' for x in TASKS), *(f'{x}_paper' for x in TASKS)]
    assert list(t.columns) == want
    assert list(t['model']) == list(paper.models(n)) and len(t) == COUNTS[n]


def test_row_order_does_not_depend_on_the_frame():
    s = frame(**{'SFT v2|arc': .7})
    pd.testing.assert_frame_equal(tables.table(3, s), tables.table(3, s.sample(frac=1, random_state=0)))


def test_bold_and_ties():
    "The best of each column is bold, two that print alike both; the paper's values where the paper has them bold."
    s = frame(**{'Merge v1|arc': .8, 'Merge v3|arc': .800001, 'Merge v2|gsm8k': .9})
    md = printed(7, s, 'md').set_index('Model')
    bold = lambda title: {m for m, c in md[title].items() if c.startswith('**')}
    assert bold('ARC') == {'Merge v1', 'Merge v3'}
    assert bold('GSM8K') == {'Merge v2'}
    assert bold('MMLU') == set(md.index)                     # all alike
    assert md.loc['Merge v1', 'ARC'] == '**80.00** ± 5.0 (**71.16**)'
    assert md.loc['Merge v2', 'ARC'] == '50.00 ± 5.0 (71.08)'
    assert printed(7, s, 'tex').set_index('Model').loc['Merge v2', 'GSM8K'] == r'\textbf{90.00} $\pm$ 5.0 (64.52)'
    assert printed(7, s, 'html').set_index('Model').loc['Merge v2', 'GSM8K'].startswith('<b>90.00</b>')


@pytest.mark.parametrize('markup', ['html', 'md', 'tex'])
def test_plain_words_stand_beside_truthfulqa(markup):
    heads = list(printed(6, frame(plain=True), markup))
    assert heads[heads.index('TruthfulQA'):][:3] == ['TruthfulQA', 'plain words', 'Winogrande']
    assert list(printed(6, frame(), markup)) == ['Model', *TITLES]


def test_the_papers_own_columns_and_bold_are_printed():
    "Marks, base and method stand where the paper has them, in every format; its bold values are bold."
    three = printed(3, frame(), 'md').set_index('Model')
    assert list(three.loc['SFT v4'])[:3] == ['○', '✗', '○']
    assert list(three.columns[:3]) == ['Alpaca-GPT4', 'OpenOrca', 'Synth. Math-Instruct']
    assert list(printed(5, frame(), 'html')['Base SFT Model']) == ['SFT\xa0v3', 'SFT\xa0v3\xa0+\xa0v4']
    assert list(printed(7, frame(), 'tex')['Merge Method'])[3] == 'SLERP'
    assert r'$\times$' in set(printed(4, frame(), 'tex')['Synth. Math-Alignment'])
    for row in paper.ROWS:
        cells = printed(row.table, frame(), 'md').set_index('Model').loc[row.model]
        for task, title in zip(TASKS, TITLES):
            assert cells[title].endswith('**)') == (task in row.bold), (row.model, task)


@pytest.mark.parametrize('n,gone', [(3, 'SFT v4'), (4, 'DPO v1 + v2'), (7, 'Merge v4')])
def test_a_model_without_scores_is_named(n, gone):
    with pytest.raises(ValueError) as e: tables.table(n, frame(models=[m for m in MODELS if m != gone]))
    assert gone in str(e.value) and 'valuate' in str(e.value)


def test_a_benchmark_without_score_is_named():
    s = frame()
    with pytest.raises(ValueError, match='mmlu'): tables.table(3, s[(s['model'] != 'SFT v2') | (s['task'] != 'mmlu')])


def test_claims_need_all_models():
    with pytest.raises(ValueError, match='Cand. 2'): tables.claims(frame(models=[m for m in MODELS if m != 'Cand. 2']))


@pytest.mark.parametrize('n', [2, 8, '3'])
def test_no_such_table(n):
    with pytest.raises(ValueError, match='expected one of'): tables.table(n, frame())


def test_a_shared_first_place_is_said():
    def first_line(**changed): return tables.finding(7, tables.table(7, frame(**changed)), 'invented').splitlines()[0]
    said = first_line(**{'Merge v1|arc': .8, 'Merge v3|arc': .8})
    assert said == 'Table 7, invented: Merge v1 and Merge v3 share the highest H6 (55.0)'
    said = first_line(**{'Merge v1|arc': .8})
    assert said.startswith('Table 7, invented: Merge v1 has the highest H6 (55.0) and is not resolved from Merge v2')


# ---- verdicts

S, C, N = 'supported', 'contradicted', 'undecided'


def test_few_trainings_need_a_larger_difference():
    "Three trainings leave two degrees of freedom: 4.30 standard errors instead of 1.96."
    assert [tables.judge('>', d, .01, 2) for d in (.042, .044)] == [N, S]
    assert tables.judge('>', .042, .01) == S


@pytest.mark.parametrize('op', ['>', '<', '≈', '≥'])
def test_noise_decides_nothing(op):
    "Where the standard error is large, no small difference supports or contradicts a claim, of sameness least of all."
    for d in (-.05, -.02, 0, .02, .05): assert tables.judge(op, d, .04) == N


def trained(n, gap, noise, seeds, models=MODELS) -> pd.DataFrame:
    "Samples of several seeds: SFT v3 is better at GSM8K by `gap`, and every training moves each model by `noise`."
    rng = np.random.default_rng(0)
    out = []
    for s in range(seeds):
        for m in models:
            shift = rng.normal(0, noise) + gap*(m == 'SFT v3')
            right = {t: np.arange(n) < n*(.5 + shift*(t == 'gsm8k')) for t in TASKS[1:]}
            out += [pd.DataFrame(dict(model=m, task=t, doc_id=range(n), score=x.astype(float), seed=s))
                    for t, x in right.items()]
    return pd.concat(out, ignore_index=True)


def scored(samples) -> pd.DataFrame:
    "The scores that such samples give, over seeds where there are several."
    def one(x): return pd.DataFrame([dict(model=m, task=t, metric='acc', score=g.mean(), se=g.std()/len(g)**.5,
                                          n=len(g))
                                     for (m, t), g in x.groupby(['model', 'task'], sort=False)['score']])
    by = {s: one(x) for s, x in samples.groupby('seed')}
    return tables.over_seeds(by) if len(by) > 1 else by[0]


def test_a_verdict_needs_both_noises():
    "Ten points that every training shows support a claim; the same ten on average, where trainings scatter, do not."
    which = [c for c in paper.CLAIMS if c.name == 'Math data lifts GSM8K']
    def verdict(noise, seeds):
        x = trained(400, .1, noise, seeds, ['SFT v2', 'SFT v3'])
        return tables.claims(scored(x), which, x).iloc[0]
    steady, scattered, alone = verdict(.002, 5), verdict(.15, 5), verdict(.15, 1)
    assert (steady['on_ours'], steady['seeds']) == (S, 5) and scattered['on_ours'] == N
    assert alone['on_ours'] != N and alone['seeds'] == 1                 # of items alone it would be one: provisional
    said = tables.in_words(pd.DataFrame([alone])).columns
    assert 'one seed: provisional' in said[2] and 'provisional' in said[1]
    assert 'provisional' not in tables.in_words(pd.DataFrame([steady])).columns[2]


def test_what_is_tested_is_what_is_shown(full, tmp_path):
    "The samples' means are the scores, also where a protocol counts items otherwise than they are stored."
    (tmp_path/'then.toml').write_text('extends = "smoke"\n[eval]\nprotocol = "leaderboard-2023"\n')
    differs = []
    for profile in ('smoke', str(tmp_path/'then.toml')):
        exp = Experiment(profile, store=full)
        shown = exp.scores().query("task in @TASKS").set_index(['model', 'task'])['score']
        tested = exp.samples().groupby(['model', 'task'])['score'].mean()
        pd.testing.assert_series_equal(shown.sort_index(), tested.sort_index())
        differs.append(shown)
    assert (differs[0] != differs[1]).any()                 # subjects of MMLU have unequal numbers of items there


def test_a_table_over_seeds_has_their_mean_and_both_noises():
    x = trained(400, 0, .05, 4, ['Cand. 1', 'Cand. 2'])
    t, by = tables.table(6, scored(x)).set_index('model'), x.groupby(['model', 'task', 'seed'])['score'].mean()
    gsm = by['Cand. 1', 'gsm8k']
    assert t.loc['Cand. 1', 'gsm8k'] == pytest.approx(100*gsm.mean(), abs=.01)
    item = x[(x['task'] == 'gsm8k') & (x['model'] == 'Cand. 1')].groupby('seed')['score'].var()/400
    assert t.loc['Cand. 1', 'gsm8k_se'] == pytest.approx(100*math.sqrt(item.mean() + gsm.var()/4), abs=.01)
    h6 = by['Cand. 1'].groupby('seed').mean()                            # one training moves all six together
    assert tables.noises(scored(x)).set_index(['model', 'task']).loc[('Cand. 1', 'h6'), 'training_sd'] == \
        pytest.approx(100*h6.std())


@pytest.mark.parametrize('se,same', [(.005, S), (.01, N)])
def test_claims_on_equal_scores(se, same):
    """Where nothing differs, a claim of a difference is undecided; one of none is supported if a difference of two
    points would have shown (2·√2·se below .02)."""
    c = tables.claims(frame(se=se)).set_index('claim')
    assert list(c.index) == [x.name for x in paper.CLAIMS]
    for x in paper.CLAIMS:
        if {'>', '<'} & {p[2] for p in x.parts}: assert c.loc[x.name, 'on_ours'] == N, x.name
        elif any(p[0] != 'h6' for p in x.parts): assert c.loc[x.name, 'on_ours'] == same, x.name


def test_claims_follow_the_scores():
    c = lambda **changed: tables.claims(frame(se=.01, **changed)).set_index('claim')['on_ours']
    up = c(**{'SFT v3|gsm8k': .6})
    assert up['Math data lifts GSM8K'] == S                  # .1 is 7 standard errors of the difference
    assert up['DPO costs GSM8K'] == S
    assert c(**{'SFT v3|gsm8k': .52})['Math data lifts GSM8K'] == N
    assert c(**{'SFT v3|gsm8k': .4})['Math data lifts GSM8K'] == C
    assert c(**{'SFT v3|mmlu': .4})['Math data costs nothing elsewhere'] == C
    best = c(**{f'SFT v4|{t}': .6 for t in TASKS[1:]})
    assert best['SFT v4 beats SFT v3 everywhere'] == S and best['Merged SFT v3 + v4 keeps the rest'] == C


def test_claims_on_the_paper_do_not_depend_on_ours():
    a, b = tables.claims(frame(.2)), tables.claims(frame(.8))
    assert list(a['on_paper']) == list(b['on_paper'])
    a = a.set_index('claim')['on_paper']
    assert a['Math data lifts GSM8K'] == S and a['DPO costs GSM8K'] == S and a['OpenOrca leaves H6 as it is'] == S
    assert a['DPO v2 is a strict improvement'] != S          # three of its scores are lower


def test_a_claim_shows_the_numbers_that_decide_it():
    s = frame(se=.03, **{'SFT v3|gsm8k': .65})
    r = tables.claims(s).set_index('claim').loc['Math data lifts GSM8K']
    assert r['our_numbers'] == 'GSM8K, SFT v3 > SFT v2: +15.00 ± 4.24, supported'     # .03·√2 = .0424
    # 64.14 - 57.32; √(.6414·.3586/1319 + .5732·.4268/1319) = .0190
    assert r['paper_numbers'] == 'GSM8K, SFT v3 > SFT v2: +6.82 ± 1.90, supported'
    assert r['our_parts'] == r['paper_parts'] == (S,)


@pytest.mark.parametrize('n', COUNTS)
def test_a_figure_sets_paper_and_ours_each_about_its_own_mean(n):
    """The pattern down a column can be read however far apart the levels are: dots of each side add up to nothing, a
    point is equally wide in all panels."""
    fig = figure(n, frame(.1, **{f'{paper.models(n)[0]}|arc': .2}), 'invented')
    axes = fig.axes
    assert [a.get_title(loc='left') for a in axes] == TITLES
    for a in axes:
        for dots in (c.lines[0].get_xdata() for c in a.containers):
            assert len(dots) == COUNTS[n] and abs(sum(dots)) < 1e-6
    theirs = [r.scores[1] for r in paper.ROWS if r.table == n]
    assert axes[1].containers[0].lines[0].get_xdata() == pytest.approx([x - sum(theirs)/len(theirs) for x in theirs])
    fig.canvas.draw()
    points = [a.get_window_extent().width/(a.get_xlim()[1] - a.get_xlim()[0]) for a in axes]
    assert max(points) < 1.02*min(points)
    plt.close(fig)


# ---- files

FETCHING = 'script', 'link', 'iframe', 'object', 'embed', 'video', 'audio', 'source', 'base'


class References(HTMLParser):
    "Everything in a page that a browser would fetch."
    def __init__(self): super().__init__(); self.images, self.others = [], []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == 'img': self.images.append(a['src'])
        elif tag in FETCHING: self.others.append(tag)
        elif tag != 'a': self.others += [v for k, v in attrs if k in ('src', 'href', 'background', 'data')]


def publish_invented(out):
    provenance = pd.DataFrame([dict(stage='base', kind='base', seconds=1.25),
                               dict(stage='<odd & name>', kind='data', seconds=None)])
    return publish(frame(plain=True, **{'SFT v4|arc': .7}), out, 'a <label> & more', provenance)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    return out, publish_invented(out)


def test_what_is_published(published):
    out, files = published
    want = {f'tables/table{n}.{e}' for n in COUNTS for e in ('csv', 'html', 'md', 'tex')}
    want |= {f'figures/table{n}.png' for n in COUNTS}
    want |= {'figures/claims.png', 'report.html', 'tables/claims.csv', 'tables/truthfulqa_plain.csv'}
    there = [f for f in out.rglob('*') if f.is_file()]
    for found in (files, there): assert {f.relative_to(out).as_posix() for f in found} == want
    assert all(f.stat().st_size for f in files)


@pytest.mark.parametrize('n', COUNTS)
def test_csv(n, published):
    with open(published[0]/'tables'/f'table{n}.csv', encoding='utf-8', newline='') as f: head, *rows = csv.reader(f)
    assert head == ['model', *TASKS, *(f'{x}_se' for x in TASKS), *(f'{x}_paper' for x in TASKS)]
    assert [r[0] for r in rows] == list(paper.models(n))
    assert all(re.fullmatch(r'\d+\.\d\d', x) for r in rows for x in r[1:])
    theirs = [r for r in paper.ROWS if r.table == n]
    assert [[float(x) for x in r[15:22]] for r in rows] == [list(p.scores) for p in theirs]


@pytest.mark.parametrize('n', COUNTS)
def test_html_md_and_tex_hold_the_same_rows(n, published):
    for e in ('html', 'md', 'tex'):
        text = (published[0]/'tables'/f'table{n}.{e}').read_text(encoding='utf-8')
        assert [m for m in paper.models(n) if m not in text] == [], e
        label = r'a \textless{}label\textgreater{} \& more' if e == 'tex' else 'a &lt;label&gt; &amp; more'
        assert label in text, e                              # says what the scores are of
    assert len(pd.read_html(published[0]/'tables'/f'table{n}.html')[0]) == COUNTS[n]


def test_report_is_one_self_contained_page(published):
    page = (published[0]/'report.html').read_text(encoding='utf-8')
    seen = References(); seen.feed(page)
    assert seen.others == [] and len(seen.images) == 6
    assert all(i.startswith('data:image/png;base64,') for i in seen.images)
    assert not re.search(r'https?://|@import|url\(', re.sub(r'base64,[^"]*', '', page))
    for c in paper.CLAIMS: assert c.name in page
    assert 'a &lt;label&gt; &amp; more' in page and '&lt;odd &amp; name&gt;' in page and '<label>' not in page


def test_report_answers_first_and_folds_the_rest(published):
    "It was one page of 17,000 pixels without summary or contents."
    page = (published[0]/'report.html').read_text(encoding='utf-8')
    top, rest = page.split('<nav>')
    assert top.count('<li>') == 5 and 'claims' in top and 'highest H6' in top
    links = re.findall(r'href="#(\w+)"', page)
    assert links == [*(f'table{n}' for n in COUNTS), 'claims', 'more'] == re.findall(r'id="(\w+)"', page)
    assert '<details open' not in page and rest.index('id="more"') < rest.index('<details class="more">')
    for n in COUNTS:
        part = page[page.index(f'id="table{n}"'):].split('<h2')[0]
        assert part.count('<img') == 1 and 'highest H6' in part.split('<table')[0] and 'In the paper' in part


def test_recorded_seeds_stand_beside_a_run_of_ones_own():
    one, theirs = frame(), tables.over_seeds({s: frame(.4 + .01*s) for s in (0, 1, 2)})
    items = pd.DataFrame([dict(model=m, task=t, doc_id=i, seed=s, score=i % 2) for m in MODELS for t in TASKS[1:]
                          for i in range(4) for s in (0, 1, 2)])
    *_, last = summary(one, 'mine', tables.claims(one), beside=Run('three seeds', theirs, items))
    assert last.startswith('Beside three seeds: of the verdicts on the claims ') and 'agree' in last
    alone = summary(one, 'mine', tables.claims(one))
    assert len(alone) == 5 and 'one seed cannot tell' in alone[2] and 'three seeds' not in ' '.join(alone)


def test_published_twice_is_the_same_bytes(tmp_path, published):
    again = publish_invented(tmp_path)
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in published[1]]


@pytest.mark.parametrize('which', ['table7.csv', 'table3.png', 'report.html'])
def test_a_full_disk_leaves_the_files_of_before(tmp_path, monkeypatch, published, which):
    "Tables, pictures and the page were once written in place: a run that was stopped left half of one."
    shutil.copytree(published[0], tmp_path, dirs_exist_ok=True)
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    real = os.fsync

    def full(fd):
        name = Path(os.readlink(f'/proc/self/fd/{fd}')).name
        stem, ending = which.split('.')
        if name.startswith(f'.{stem}.') and name.endswith(ending): raise OSError(errno.ENOSPC, 'No space left')
        return real(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        publish(frame(.3, plain=True), tmp_path, 'another', pd.DataFrame(dict(stage=['x'])))
    after = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    assert after.keys() == before.keys()
    there, = (f for f in before if f.name == which)
    assert after[there] == before[there]


@pytest.mark.parametrize('which', ('table', 'claims'))
def test_a_long_label_stays_on_the_picture(which):
    "Labels of published data name their stand-ins; they once ran off the edge, under the legend and through the marks."
    label = ('SmolLM2-135M, from an instruction-tuned base, math sets by a stand-in rule '
             '(MATH and GSM8K train rows, no MetaMathQA), seed 0')
    fig = figure(3, frame(), label) if which == 'table' else claims_figure(tables.claims(frame()), label)
    fig.canvas.draw()
    parts = [fig._suptitle, *fig.legends, *(ax._left_title for ax in fig.axes)]
    if which == 'table': parts.append(fig._supxlabel)
    boxes = [p.get_window_extent() for p in parts]
    assert all(b.x0 >= 0 and b.x1 <= fig.bbox.x1 and b.y1 <= fig.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i] if a.width and b.width)
    assert 'no MetaMathQA' in fig._suptitle.get_text().replace('\n', ' ')
    plt.close(fig)
