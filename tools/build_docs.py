"""Build the documentation site without Quarto: nbdev applies the directives, smalldocs renders, nothing is fetched.

Outputs are those of a run (`runs/PROFILE/notebooks/`, as `make tables` leaves them) where its notebooks are still the
ones in nbs/; otherwise the outputs stored in nbs/, which may be none. Code is not run here.
"""
import argparse
import ast
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

import yaml

os.environ['IN_TEST'] = '1'          # what nbdev itself sets while it processes notebooks
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from execnb.nbio import mk_cell, read_nb, write_nb
from keep_outputs import take_outputs
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from smalldocs.api import package_modules
from smalldocs.site import build

os.chdir(Path(__file__).resolve().parents[1])
cfg = get_config()
BASE = re.escape((cfg.doc_host + cfg.doc_baseurl).rstrip('/') + '/')
SECTIONS = {
    'core': 'Core',
    'models': 'Models',
    'inference': 'Inference',
    'merging': 'Merging',
    'publishing': 'Publishing',
    'stages': 'Stages',
    'execution': 'Execution',
    'planning': 'Planning',
    'pipeline': 'Pipeline',
    'reports': 'Reports',
}  # of the machinery, in this order; others by their own name, last
RESULTS = ['tables.ipynb', 'answers.qmd']                   # the pages that one comes for, first
STORY = '.', 'tiny'                                         # folders of pages on which code is folded
EXPORT = re.compile(r'^#\|\s*exports?\b.*\n?', flags=re.M)


def fix_md(s: str, up: str) -> str:
    "Site links become relative; links that nbdev put inside code fences become plain names again."
    parts = re.split(r'(^```.*?^```)', s, flags=re.S | re.M)
    for i, p in enumerate(parts):
        parts[i] = (re.sub(rf'\[(`[^`]+`)\]\({BASE}[^)]*\)', r'\1', p) if p.startswith('```')
                    else re.sub(rf'\]\({BASE}', f']({up}', p))
    return ''.join(parts)


def parsed(source: str) -> list[ast.stmt]:
    "The statements of a cell; none if it holds a magic."
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def full_name(d: ast.stmt) -> str:
    "Name of a definition; that of a method which `patch` adds to a class is `Class.method`."
    patched = any(ast.unparse(x).startswith('patch') for x in d.decorator_list)
    return f'{ast.unparse(d.args.args[0].annotation)}.{d.name}' if patched else d.name


def is_listed(d: ast.stmt) -> bool:
    "The reference lists what is public, methods of public classes too, and no properties."
    private = any(part.startswith('_') for part in full_name(d).split('.'))
    return not private and not any('as_prop' in ast.unparse(x) for x in d.decorator_list)


def show_exports(nb, reference: str) -> None:
    "Exported code is shown as it stands, under links to its reference; imports are folded, in one place."
    cells, imports = [], None
    for c in nb.cells:
        body = parsed(c.source) if c.cell_type == 'code' else []
        if body and EXPORT.search(c.source):
            c.source = EXPORT.sub('', c.source, count=1)
            defined = [d for d in body if isinstance(d, (ast.FunctionDef, ast.ClassDef))]
            public = [full_name(d) for d in defined if is_listed(d)]
            others = [
                full_name(d) for d in defined if full_name(d) not in public
            ]  # nbdev links to these and to methods too
            others += [
                f'{d.name}.{m.name}'
                for d in defined
                if isinstance(d, ast.ClassDef)
                for m in d.body
                if isinstance(m, ast.FunctionDef)
            ]
            links = ' '.join(f'<a id="{n.lower()}" href="{reference}#{n}"><code>{n}</code></a>' for n in public)
            anchors = ''.join(f'<a id="{n.lower()}"></a>' for n in others)
            if defined:
                kind, said = ('defines', 'reference: ') if public else ('anchors', '')
                cells.append(mk_cell(f'<p class="{kind}">{said}{links}{anchors}</p>', cell_type='markdown'))
        if body and all(isinstance(b, (ast.Import, ast.ImportFrom)) for b in body) and '#| hide' not in c.source:
            if imports and imports is cells[-1]:
                imports.source += f'\n\n{c.source}'
                continue
            c.source = f'#| code-fold: true\n#| code-summary: "imports"\n{c.source}'
            imports = c
        cells.append(c)
    nb.cells[:] = cells


def fold_code(nb) -> None:
    "On a page of the story code is there for whoever asks; results and prose stand open."
    for c in nb.cells:
        if c.cell_type != 'code' or '#| code-fold' in c.source: continue
        defined = [d.name for d in parsed(c.source) if isinstance(d, (ast.FunctionDef, ast.ClassDef))]
        names = [n for n in defined if n[0] != '_']
        what = f'code: {", ".join(names)}' if names else 'code'
        c.source = f'#| code-fold: true\n#| code-summary: "{what}"\n{c.source}'


def elsewhere(name: str, up: str) -> str:
    "Where a page's notebook can be had: as a file, as it lies in the repository, and where it runs without set-up."
    repo = f'{cfg.user}/{cfg.repo}'
    links = {
        'download this notebook': f'{up}notebooks/{name}" download="{Path(name).name}',
        'its source': f'{cfg.git_url}/blob/{cfg.branch}/nbs/{name}',
        'open in Colab': f'https://colab.research.google.com/github/{repo}/blob/{cfg.branch}/nbs/{name}',
        'open in Binder': f'https://mybinder.org/v2/gh/{repo}/{cfg.branch}?labpath={quote(f"nbs/{name}", safe="")}',
    }
    first = f' (first cell: <code>%pip install git+{cfg.git_url}</code>)'       # Colab knows nothing of this package
    shown = [f'<a href="{u}">{t}</a>' + first*('Colab' in t) for t, u in links.items()]
    return f'<p class="elsewhere">{" · ".join(shown)}</p>'


def answers_page(recorded: Path) -> str:
    "One prompt, all models, side by side, from recorded answers: HTML under a title."
    kept = json.loads(recorded.read_text(encoding='utf-8'))
    text = lambda t: html.escape(t).replace('\n', '<br>')
    out = [
        '---\ntitle: Answers\n'
        'description: "One prompt, all models, side by side, as evaluations recorded them."\n---\n',
        f"A recorded run of the **{kept['label']}**, not of SOLAR 10.7B. Of each benchmark these are the items "
        'on which the models differ most, so no hand chose them. A green edge: scored as right.\n',
    ]
    for x in kept['items']:
        cards = ''.join(
            f'<div class="answer{" right" if x["score"][m] >= .5 else ""}"><b>{html.escape(m)}</b> '
            f'<span>{x["score"][m]:g}</span><br>{text(a)}</div>'
            for m, a in x['said'].items()
        )
        out.append(f'## {x["task"]}, item {x["item"]}\n\n```{{=html}}\n<p class="asked">{text(x["prompt"])}</p>\n'
                   f'<p class="asked-right">right: {text(x["right"])}</p>\n<div class="answers">{cards}</div>\n```\n')
    return '\n'.join(out)


def alt_texts(nb) -> None:
    "A figure without a text of its own is described by the heading and the prose that lead to it."
    heading = prose = ''
    for c in nb.cells:
        if c.cell_type == 'markdown':
            for block in re.split(r'\n\s*\n|\n(?=#)', c.source):
                if m := re.match(r'#+\s+(.*)\n?', block):
                    heading, block = m[1], block[m.end():]
                if block.strip() and not block.startswith(('<', '|', '```')):
                    prose = block.lstrip('> ')
            continue
        n = sum('image/png' in o.get('data', {}) for o in c.get('outputs', []))
        if n and 'fig-alt' not in c.source:
            first, *more = re.split(r'(?<=[.:])\s', ' '.join(prose.split()))
            while more and len(first) < 30: first += f' {more.pop(0)}'         # "On the toy models:" says too little
            alt = re.sub(r'[*`$\\"]|\[|\]\([^)]*\)', '', f'under {heading}: {first}').strip(': ')
            c.source = f'#| fig-alt: "{"Figure" if n == 1 else f"One of {n} figures"} {alt}"\n{c.source}'


def process(src: Path, nbs: Path, proc: Path, run: Path, pages: dict[str, str]) -> str:
    "Run nbdev's processors on one notebook and write it under its output name; returns that, relative to the site."
    folder = src.relative_to(nbs).parent
    up = '../' * len(folder.parts)
    nb = read_nb(src)
    if not take_outputs(nb, run / src.relative_to(nbs)) and run.is_dir() and src.name != 'index.ipynb':
        print(
            f'{src.relative_to(nbs)}: not as it was executed for {run.parent.name}; shown with the outputs stored in it'
        )
    module = next((m[1] for c in nb.cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, flags=re.M))), '')
    show_exports(nb, f"{up}{pages.get(f'{cfg.lib_name}.{module}', '')}")
    alt_texts(nb)
    if folder.as_posix() in STORY and src.name != 'index.ipynb': fold_code(nb)
    FilterDefaults()(nb)
    raw = bool(nb.cells) and nb.cells[0].cell_type == 'raw'
    front = yaml.safe_load(nb.cells[0].source.strip().strip('-')) if raw else {}
    out = folder / Path(front.pop('output-file', src.stem)).with_suffix('.ipynb').name
    if raw:
        nb.cells[0].source = f'---\n{yaml.safe_dump(front)}---\n'
    if src.name != 'index.ipynb':
        nb.cells.insert(int(raw), mk_cell(elsewhere(src.relative_to(nbs).as_posix(), up), cell_type='markdown'))
    for c in nb.cells:
        if c.cell_type == 'markdown':
            c.source = fix_md(c.source, up).replace('<details>', '<details open>')
        for o in c.get('outputs', []):
            d = o.get('data', {})
            if 'text/markdown' in d:
                d['text/markdown'] = fix_md(''.join(d['text/markdown']), up)
            if 'text/html' in d:
                d['text/html'] = ''.join(d['text/html']).replace(
                    '<table border="1" class="dataframe">', '<table class="dataframe">'
                )
    (proc / folder).mkdir(parents=True, exist_ok=True)
    write_nb(nb, proc / out)
    return out.as_posix()


def api_pages() -> dict[str, str]: # module -> its page in the site
    "The reference pages that smalldocs will write, by its own rule for names."
    mods = [m.__name__ for m in package_modules(cfg.lib_name)]
    short = [m.rpartition('.')[2] for m in mods]
    return {m: f'api/{s if short.count(s) == 1 else m}.html' for m, s in zip(mods, short)}


def sidebar(pages: list[str]) -> list:
    "Front page, results, the story in its order, the tiny world; then machinery and reference by floors, folded."
    folders = {p: Path(p).parent.as_posix() for p in pages if p not in ('index.ipynb', *RESULTS)}
    inside = lambda f: [p for p in pages if folders.get(p) == f]
    known = [f for f in SECTIONS if f in folders.values()]
    rest = sorted(set(folders.values()) - {*known, *STORY})
    reference = {name: [] for name in ('The story', *SECTIONS.values())}
    for module, page in api_pages().items():
        part = module.split('.')[1] if module.count('.') > 1 else 'The story'
        reference.setdefault(SECTIONS.get(part, part[0].upper() + part[1:]), []).append(page.replace('.html', '.qmd'))
    section = lambda name, contents: dict(section=name, contents=contents)
    return [
        'index.ipynb',
        section('Results', [p for p in RESULTS if p in pages]),
        section('The story', inside('.')),
        section('The tiny world', inside('tiny')),
        section('The machinery', [section(SECTIONS.get(f, f.capitalize()), inside(f)) for f in [*known, *rest]]),
        section('API reference', [section(name, found) for name, found in reference.items() if found]),
    ]


def offline(site: Path) -> None:
    "Nothing on a page is loaded from another host; search works from file:// too."
    for f in site.rglob('*.css'):
        f.write_text(re.sub(r'@import url\(https?://[^)]*\);', '', f.read_text(encoding='utf-8')), encoding='utf-8')
    shutil.copytree(Path(__file__).parent / 'katex', site / 'site_libs' / 'katex')
    idx = (site / 'search.json').read_text(encoding='utf-8')
    (site / 'site_libs' / 'search-data.js').write_text(
        f"const sdIdx={idx};const sdFetch=window.fetch;window.fetch=(u,...a)=>String(u).endsWith('search.json')"
        "?Promise.resolve({ok:true,json:()=>Promise.resolve(sdIdx)}):sdFetch(u,...a);", encoding='utf-8')
    for f in site.rglob('*.html'):
        s = f.read_text(encoding='utf-8')
        up = '../' * (len(f.relative_to(site).parts) - 1)
        s = re.sub(r'https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist', f'{up}site_libs/katex', s)
        s = s.replace('</head>', f'<script src="{up}site_libs/search-data.js"></script></head>', 1)
        f.write_text(s, encoding='utf-8')
        loads = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', s)
        if bad := [u for u in loads if not u.startswith(cfg.doc_host)]:
            sys.exit(f'{f}: loads {bad}; expected nothing from another host')


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument(
        '--profile',
        default='tiny',
        help='name or file: the run in runs/ whose executed notebooks are shown (default: tiny)',
    )
    args = ap.parse_args()
    refresh_quarto_yml()                       # nbs/nbdev.yml from settings.ini
    nbs, proc, run = (
        cfg.nbs_path.resolve(),
        cfg.config_path / '_proc',
        cfg.config_path / 'runs' / Path(args.profile).stem / 'notebooks',
    )
    print(
        'outputs:',
        run.relative_to(cfg.config_path) if run.is_dir() else 'as stored in nbs/ (`make tables` first has a run shown)',
    )
    shutil.rmtree(proc, ignore_errors=True)
    proc.mkdir()
    sources = sorted(nbglob(as_path=True), key=lambda p: p.resolve().relative_to(nbs).as_posix())
    os.chdir(nbs)
    reference = api_pages()
    pages = [process(f.resolve(), nbs, proc, run, reference) for f in sources]
    for name in ('_quarto.yml', 'nbdev.yml', 'styles.css'):
        shutil.copy2(nbs / name, proc / name)
    recorded = nbs / 'recorded' / 'answers.json'
    if recorded.exists():
        (proc / 'answers.qmd').write_text(answers_page(recorded), encoding='utf-8')
        pages.append('answers.qmd')
    side = {'website': {'sidebar': {'contents': sidebar(pages)}}}
    (proc / 'sidebar.yml').write_text(yaml.safe_dump(side, sort_keys=False), encoding='utf-8')
    site = build(str(proc))
    dest = cfg.doc_path
    shutil.rmtree(dest, ignore_errors=True)
    shutil.move(proc / dest.name, dest)
    shutil.copytree(nbs / 'recorded', dest / 'recorded', dirs_exist_ok=True)
    for f in sources:
        kept = dest / 'notebooks' / f.resolve().relative_to(nbs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f.resolve(), kept)
    offline(dest)
    for w in site.warnings:
        print('warning:', w)
    print('site in', dest.relative_to(cfg.config_path))


if __name__ == '__main__':
    main()
