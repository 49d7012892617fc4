"The documentation site, as a browser shows it, and the tables that sort and filter."

import html
import inspect
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from common import NOTEBOOKS, ROOT, run

pytestmark = pytest.mark.slow      # the site takes minutes to build: `make test-all`
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site of a copy of this tree, with one notebook executed (a figure and a table) and one that has changed since."
    home = tmp_path_factory.mktemp('site')
    for name in ('nbs', 'solar_repro', 'tools'):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, home)
    (home / 'nbs' / 'more').mkdir()
    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# A new page\n> Of a new folder.')])
    nbformat.write(new, home / 'nbs' / 'more' / '00_new.ipynb')
    done = home / 'runs' / 'tiny' / 'notebooks'
    done.mkdir(parents=True)
    nb = nbformat.read(home / 'nbs' / '04_merge.ipynb', 4)
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = []   # those that are stored
    cell = [c for c in nb.cells if c.cell_type == 'code' and 'plt' in c.source][-1]
    cell.outputs = [
        nbformat.v4.new_output('display_data', {'image/png': PNG, 'text/plain': ''}),
        nbformat.v4.new_output('display_data', {'text/html': pd.DataFrame(dict(a=[1])).to_html(), 'text/plain': ''}),
    ]
    nbformat.write(nb, done / '04_merge.ipynb')
    nb = nbformat.read(home / 'nbs' / '05_eval.ipynb', 4)
    nb.cells[0].source += ' changed'
    nbformat.write(nb, done / '05_eval.ipynb')
    made = run(sys.executable, 'tools/build_docs.py', cwd=home, PYTHONPATH=str(home))
    assert made.returncode == 0, (made.stdout + made.stderr)[-3000:]
    return home / '_docs', made.stdout


class Page(HTMLParser):
    "Links, anchors, pictures and words of a page."

    def __init__(self, file):
        super().__init__()
        self.links, self.ids, self.images = [], set(), []
        self.feed(file.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]
        if tag == 'img':
            self.images.append(a)


@pytest.fixture(scope='session')
def pages(site):
    return {p: Page(p) for p in sorted(site[0].rglob('*.html'))}


def test_site_has_a_page_for_every_notebook_and_module(site, pages):
    names = {p.relative_to(site[0]).as_posix() for p in pages}
    assert {'index.html', 'more/new.html', 'answers.html'} <= names
    assert len([n for n in names if not n.startswith('api/')]) == len(NOTEBOOKS) + 2
    modules = [p for p in (ROOT / 'solar_repro').rglob('*.py') if not p.name.startswith('_')]
    assert len([n for n in names if n.startswith('api/')]) == len(modules)
    side = (site[0] / 'index.html').read_text()
    assert all(f'href="{n}"' in side for n in names), 'every page stands in the sidebar, new ones by themselves'


def test_site_links_lead_somewhere(site, pages):
    broken, seen = [], 0
    for file, page in pages.items():
        for link in page.links:
            u = urlsplit(link)
            if u.scheme or u.netloc or not (u.path or u.fragment):
                continue
            seen += 1
            target = (file.parent / unquote(u.path)).resolve() if u.path else file
            if not target.exists() or u.fragment and target in pages and unquote(u.fragment) not in pages[target].ids:
                broken.append(f'{file.relative_to(site[0])}: {link}')
    assert seen > 500 and not broken, broken[:20]


def test_site_shows_a_run_only_if_its_notebooks_are_these(site, pages):
    "Outputs come from the executed notebook; one that has changed is said, and shown without."
    assert 'outputs: runs/tiny/notebooks' in site[1] and '05_eval.ipynb: not as it was executed' in site[1]
    images = pages[site[0] / 'merge.html'].images
    assert len(images) == 1 and re.match(r'Figure under [\w ]+: \w+', images[0]['alt']) and len(images[0]['alt']) > 40
    assert '<table class="dataframe">' in (site[0] / 'merge.html').read_text()


def test_site_pictures_are_described_and_code_is_shown(site, pages):
    assert not [p.name for p, page in pages.items() for i in page.images if not i.get('alt')]
    merge = (site[0] / 'merge.html').read_text()
    assert 'id="merge_models"' in merge and 'href="api/merge.html#merge_models"' in merge
    api = (site[0] / 'api' / 'merge.html').read_text()
    assert 'merge_models' in api and 'checkpoint folder to write' in api
    assert '#| export' not in merge and str(ROOT) not in merge


STORY = 'paper', 'data', 'sft', 'dpo', 'merge', 'eval', 'tables', 'your_own', 'tiny/world', 'tiny/base'


def test_site_code_of_the_story_is_folded(site):
    "Results and prose stand open; on pages of the machinery, of which code is the matter, it stands open, too."
    folded = re.compile(r'<details class="code-fold">.*?</details>', flags=re.S)
    for name in STORY:
        text = (site[0] / f'{name}.html').read_text()
        assert folded.search(text) and 'cell-code' not in folded.sub('', text), name
    assert 'cell-code' in folded.sub('', (site[0] / 'core' / 'stats.html').read_text())


def test_site_pages_say_where_their_notebook_is(site, pages):
    "To download, at its source, in Colab with what a first cell has to do there, in Binder."
    notebooks = {p for p in pages if 'api' not in p.parts and p.name not in ('index.html', 'answers.html')}
    assert len(notebooks) == len(NOTEBOOKS)              # less the front page, and the new one
    for p in notebooks:
        line, = re.findall(r'<p class="elsewhere">(.*?)</p>', p.read_text(), flags=re.S)
        file = re.search(r'href="([^"]+)" download=', line)[1]
        assert (p.parent / file).is_file() and file.endswith('.ipynb')
        name = file.split('notebooks/', 1)[1]
        assert f'/blob/main/nbs/{name}">its source' in line and f'/nbs/{name}">open in Colab' in line
        assert re.search(r'open in Colab</a> \(first cell: <code>%pip install git\+https://\S+</code>\)', line), p


def test_site_leads_with_results_and_tells_the_story_before_the_machinery(site):
    text = (site[0] / 'index.html').read_text()
    side = re.findall(r'href="([^"]+)" class="sidebar-item-text', text)
    order = ['index.html', 'tables.html', 'answers.html', *(f'{n}.html' for n in STORY if n != 'tables'),
             'core/config.html', 'reports/cli.html', 'api/merge.html']
    assert side[:4] == order[:4] and order == sorted(order, key=side.index)


def test_site_reference_shows_parameters_as_a_table(site):
    from solar_repro.merge import merge_models
    text = (site[0] / 'api' / 'merge.html').read_text()
    part = re.search(r'<section id="merge_models".*?</section>', text, flags=re.S)[0]
    head, *rows = [re.findall(r'<t[dh]>(.*?)</t[dh]>', r, flags=re.S) for r in re.findall(r'<tr>.*?</tr>', part, re.S)]
    assert head == ['Parameter', 'Type', 'Default', 'Description']
    names = [re.sub('<.*?>', '', r[0]) for r in rows]
    assert names == [*inspect.signature(merge_models).parameters, 'returns']
    assert all(r[3] for r in rows), 'each says what it is'


def test_site_answers_are_those_of_the_record(site):
    "Every prompt, every text, and who was right, letter by letter."
    text = html.unescape((site[0] / 'answers.html').read_text(encoding='utf-8')).replace('<br>', '\n')
    kept = json.loads((ROOT / 'nbs' / 'recorded' / 'answers.json').read_text(encoding='utf-8'))
    asked = re.findall(r'<p class="asked">(.*?)</p>', text, flags=re.S)
    right = re.findall(r'<p class="asked-right">right: (.*?)</p>', text, flags=re.S)
    assert [(a, r) for a, r in zip(asked, right)] == [(x['prompt'], x['right']) for x in kept['items']]
    cards = re.findall(r'<div class="answer( right)?"><b>(.*?)</b> <span>\S+</span>\n(.*?)</div>', text, flags=re.S)
    assert cards == [(' right'*(x['score'][m] >= .5), m, a) for x in kept['items'] for m, a in x['said'].items()]


def test_site_config_is_valid_for_quarto():
    import yaml
    quarto = yaml.safe_load((ROOT / 'nbs' / '_quarto.yml').read_text())
    assert quarto['project']['type'] == 'website' and quarto['metadata-files'] == ['nbdev.yml', 'sidebar.yml']
    assert (ROOT / 'nbs' / quarto['format']['html']['css']).is_file()


# Of every element with text of its own: its contrast with the nearest ground, and what WCAG AA asks of its size.
CONTRAST = '''(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const lin = x => (x /= 255) <= .03928 ? x/12.92 : ((x + .055)/1.055)**2.4;
  const lum = c => .2126*lin(c[0]) + .7152*lin(c[1]) + .0722*lin(c[2]);
  const over = (a, b) => [0, 1, 2].map(k => a[k]*a[3] + b[k]*(1 - a[3])).concat(1);
  const ground = e => { const up = [];
    for (; e && up.at(-1)?.[3] !== 1; e = e.parentElement) up.push(parse(getComputedStyle(e).backgroundColor));
    return up.reverse().reduce((b, a) => over(a, b), [255, 255, 255, 1]); };
  const bad = new Map(), done = new Set(); let n = 0;       // one of each kind: code has thousands of like spans
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(t => t.nodeType === 3 && t.textContent.trim())) continue;
    if (e.closest('script,style,.katex-mathml')) continue;
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    n++; let kind = '';
    for (let p = e, k = 0; p && k < 5; p = p.parentElement, k++) kind += p.tagName + '.' + p.className + ' ';
    if (done.has(kind)) continue; done.add(kind);
    const s = getComputedStyle(e), g = ground(e), c = over(parse(s.color), g);
    const [a, b] = [lum(c), lum(g)].sort((x, y) => y - x), ratio = (a + .05)/(b + .05);
    const px = parseFloat(s.fontSize), large = px >= 24 || px >= 18.66 && +s.fontWeight >= 700;
    const words = ': ' + e.textContent.trim().slice(0, 30);
    if (ratio < (large ? 3 : 4.5))
      bad.set(e.tagName + '.' + e.className, ratio.toFixed(2) + ' ' + s.color + ' on ' + g + words);
  }
  return {n, bad: [...bad].map(x => x.join(' '))}; })()'''


IS_DARK = '''new Promise(done => { let n = 0;
  const dark = () => document.documentElement.classList.contains('quarto-dark');
  const look = () => dark() ? setTimeout(() => done(true), 400) : n++ > 10000 ? done(false) : setTimeout(look, 20);
  look(); })'''


# A page of each kind and folder, and all of them.
FORMS = pytest.mark.parametrize('which', ['some', pytest.param('all', marks=pytest.mark.slow)])


def looked_at(site, pages, which):
    "All pages, or the story's and the first of each folder, whose references stand in `api`."
    if which == 'all': return list(pages)
    inside = [p for p in pages if p.parent != site[0]]
    firsts = {p.parent: p for p in reversed(inside)}.values()
    long = max((p for p in inside if 'api' in p.parts), key=lambda p: p.stat().st_size)
    return [p for p in pages if p.parent == site[0]] + sorted({*firsts, long})


@FORMS
def test_every_page_renders_offline_in_both_schemes(site, pages, chrome, which):
    "No console error, nothing from another host, words and maths on the page, text that can be read."
    faults, n = {}, 0
    chrome.look()
    for file in looked_at(site, pages, which):
        chrome.open(file.as_uri())
        seen, said = chrome.js(CONTRAST), []
        if chrome.js('document.documentElement.classList.contains("quarto-dark")'):
            said.append('is not in the light scheme')
        if not chrome.js('document.querySelector("main h1").textContent.trim()'): said.append('has no title')
        if chrome.js('[...document.querySelectorAll(".math")].some(m => !m.querySelector(".katex"))'):
            said.append('has maths that is not set')
        chrome.js('window.smalldocsToggleScheme()')
        if not chrome.js(IS_DARK): said.append('cannot be made dark')
        dark = chrome.js(CONTRAST)
        chrome.js('window.smalldocsToggleScheme()')
        n += seen['n']
        said += chrome.complaints() + seen['bad'] + [f'dark: {b}' for b in dark['bad']]
        if said: faults[str(file.relative_to(site[0]))] = said[:6]
    chrome.look(dark=True)
    chrome.js('localStorage.clear()')
    chrome.open((site[0] / 'merge.html').as_uri())
    assert chrome.js('document.documentElement.classList.contains("quarto-dark")'), 'a reader who prefers dark gets it'
    assert n > 5000 and not faults, json.dumps(faults, indent=1)[:4000]


# Words and pictures that reach beyond the screen and cannot be scrolled to.
CUT = '''[...document.querySelectorAll('main *')].filter(e => {
  if (!e.checkVisibility() || e.getBoundingClientRect().right <= innerWidth + 1) return false;
  if (e.tagName !== 'IMG' && ![...e.childNodes].some(t => t.nodeType === 3 && t.textContent.trim())) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
  return true; }).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 30)).slice(0, 3).join(', ')'''


@pytest.mark.parametrize('width', [390, 1280])
def test_tables_are_small_and_their_captions_are_read_without_scrolling(site, chrome, width):
    "The site's own rules for tables hold against those of the theme, and a caption is as wide as what is seen."
    chrome.look(width, 844)
    chrome.open((site[0] / 'index.html').as_uri())
    cells = ''.join(f'<td>{n}.00 ± 2.0</td>' for n in range(40))
    table = f'<table class="dataframe"><caption>{"word " * 60}</caption><tr>{cells}</tr></table>'
    chrome.js(f"document.querySelector('main.content').insertAdjacentHTML('beforeend', '{table}')")
    caption = "(c => [parseFloat(getComputedStyle(c.parentElement).fontSize), c.getBoundingClientRect().right])"
    size, right = chrome.js(f"{caption}(document.querySelector('main.content > table.dataframe caption'))")
    assert size < 13 and right <= width and chrome.js('document.documentElement.scrollWidth') <= width


def test_the_papers_tables_fit_a_screen(site, chrome):
    "GSM8K, the last column, was cut at 1,280 pixels."
    chrome.look(1280, 900)
    tables = ("[...document.querySelectorAll('main table.dataframe')]"
              ".filter(t => /^Table \\d/.test(t.caption?.textContent))")
    seen = 0
    for name in ('sft', 'dpo', 'merge'):
        chrome.open((site[0] / f'{name}.html').as_uri())
        for wide, has in chrome.js(f'{tables}.map(t => [t.scrollWidth, t.clientWidth])'):
            seen += 1
            assert wide <= has, name
    assert seen >= 3


@FORMS
def test_pages_fit_a_phone(site, pages, chrome, which):
    "Nothing makes the page wider than the screen; the menu opens."
    chrome.look(390, 844)
    wide = []
    for file in looked_at(site, pages, which):
        chrome.open(file.as_uri())
        width = chrome.js('document.documentElement.scrollWidth')
        if width > 390: wide.append(f'{file.name}: {width}')
        cut = chrome.js(CUT)
        if cut: wide.append(f'{file.name}: {cut}')
    assert not wide
    chrome.open((site[0] / 'index.html').as_uri())
    shown = (
        '(e => e.checkVisibility() && e.getBoundingClientRect().right > 0)(document.querySelector("#quarto-sidebar"))'
    )
    assert not chrome.js(shown)
    chrome.js('document.querySelector(".quarto-btn-toggle").click()')
    assert chrome.js(f'new Promise(r => setTimeout(() => r({shown}), 600))')


def test_search_finds_slerp_and_opens_its_page(site, chrome):
    chrome.look()
    chrome.open((site[0] / 'index.html').as_uri())
    chrome.js(
        '''(() => { const i = document.querySelector('.smalldocs-search input'); i.focus();
        i.value = 'SLERP'; i.dispatchEvent(new Event('input', {bubbles: true})); })()'''
    )
    found = chrome.js(
        '''new Promise(done => { let n = 0; const look = () => {
        const a = [...document.querySelectorAll('.smalldocs-search-results a')].map(x => x.href);
        a.length || n++ > 5000 ? done(a) : setTimeout(look, 100); }; look(); })'''
    )
    assert found and 'merge.html' in found[0], found
    faults = chrome.js(CONTRAST)['bad']
    chrome.js('window.smalldocsToggleScheme()')
    assert chrome.js(IS_DARK)
    faults += chrome.js(CONTRAST)['bad']
    chrome.js('localStorage.clear()')
    assert not faults, 'what is found can be read in both schemes'
    chrome.open(found[0])
    assert 'SLERP' in chrome.js('document.querySelector("main").textContent') and not chrome.complaints()


# ---- tables that sort and filter

def test_a_table_sorts_and_filters_in_a_browser(chrome, tmp_path):
    from solar_repro.core.display import explore
    t = pd.DataFrame(dict(model=['SFT v1', 'SFT v2', 'DPO v1'], gsm8k=[9.5, 10.25, float('nan')]))
    (tmp_path / 'page.html').write_text(f'<meta charset="utf-8"><body>{explore(t).html}{explore(t).html}')
    chrome.open((tmp_path / 'page.html').as_uri())
    rows = lambda: chrome.js(
        '[...document.querySelectorAll("[data-explore]")[0].querySelectorAll("tbody tr")].filter(r => !r.hidden).map(r'
        ' => r.cells[0].textContent)'
    )
    click = lambda k: chrome.js(
        f'document.querySelectorAll("[data-explore]")[0].querySelectorAll("th button")[{k}].click()'
    )
    def type_(text):
        chrome.js(
            f'(() => {{ const i = document.querySelector("input"); i.value = {json.dumps(text)}; i.dispatchEvent(new'
            ' Event("input")); })()'
        )
        return rows()
    click(1)
    assert rows() == ['SFT v1', 'SFT v2', 'DPO v1']  # by number, not by text; what has none stands last
    click(1); assert rows() == ['SFT v2', 'SFT v1', 'DPO v1']
    click(0); assert rows() == ['DPO v1', 'SFT v1', 'SFT v2']
    assert (
        type_('sft v1') == ['SFT v1']
        and type_('gsm8k>10') == ['SFT v2']
        and type_('gsm8k<=9.5 sft') == ['SFT v1']
        and type_('nothing') == []
    )
    assert chrome.js('document.querySelector("output").textContent') == '0 of 3 rows' and len(type_('')) == 3
    assert (
        chrome.js('document.querySelectorAll("[data-explore]")[1].querySelector("tbody tr").cells[0].textContent')
        == 'SFT v1'
    )  # the other table is left alone
