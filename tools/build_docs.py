"Build the documentation site without Quarto: nbdev applies the directives, smalldocs renders, nothing is fetched."
import os
import re
import shutil
import sys
from pathlib import Path

import yaml

os.environ['IN_TEST'] = '1'          # what nbdev itself sets while it processes notebooks
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from execnb.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from smalldocs.api import package_modules
from smalldocs.site import build

os.chdir(Path(__file__).resolve().parents[1])
cfg = get_config()
BASE = re.escape((cfg.doc_host + cfg.doc_baseurl).rstrip('/') + '/')
FLOORS = (('.', 'The story'), ('lab', 'The machinery'), ('tiny', 'The tiny world'))


def fix_md(s: str, up: str) -> str:
    "Site links become relative; links that nbdev put inside code fences become plain names again."
    parts = re.split(r'(^```.*?^```)', s, flags=re.S | re.M)
    for i, p in enumerate(parts):
        parts[i] = (re.sub(rf'\[(`[^`]+`)\]\({BASE}[^)]*\)', r'\1', p) if p.startswith('```')
                    else re.sub(rf'\]\({BASE}', f']({up}', p))
    return ''.join(parts)


def process(src: Path, nbs: Path, proc: Path) -> str:
    "Run nbdev's processors on one notebook and write it under its output name; returns that, relative to the site."
    folder = src.relative_to(nbs).parent
    up = '../' * len(folder.parts)
    nb = read_nb(src)
    FilterDefaults()(nb)
    raw = bool(nb.cells) and nb.cells[0].cell_type == 'raw'
    front = yaml.safe_load(nb.cells[0].source.strip().strip('-')) if raw else {}
    out = folder / Path(front.pop('output-file', src.stem)).with_suffix('.ipynb').name
    if raw:
        nb.cells[0].source = f'---\n{yaml.safe_dump(front)}---\n'
    for c in nb.cells:
        if c.cell_type == 'markdown':
            c.source = fix_md(c.source, up)
        for o in c.get('outputs', []):
            d = o.get('data', {})
            if 'text/markdown' in d:
                d['text/markdown'] = fix_md(''.join(d['text/markdown']), up)
            if 'text/html' in d:
                d['text/html'] = ''.join(d['text/html']).replace('<table border="1" class="dataframe">', '<table class="dataframe">')
    (proc / folder).mkdir(parents=True, exist_ok=True)
    write_nb(nb, proc / out)
    return out.as_posix()


def api_pages() -> list[str]:
    "The reference pages that smalldocs will write, by its own rule for names."
    mods = [m.__name__ for m in package_modules(cfg.lib_name)]
    short = [m.rpartition('.')[2] for m in mods]
    return [f'api/{s if short.count(s) == 1 else m}.qmd' for m, s in zip(mods, short)]


def sidebar(pages: list[str]) -> list:
    "Front page, then the notebooks floor by floor in story order, then the reference."
    side = ['index.ipynb']
    for folder, title in FLOORS:
        inside = [p for p in pages if Path(p).parent == Path(folder) and p != 'index.ipynb']
        if inside:
            side.append(dict(section=title, contents=inside))
    return [*side, dict(section='API reference', contents=api_pages())]


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
    refresh_quarto_yml()                       # nbs/nbdev.yml from settings.ini
    nbs, proc = cfg.nbs_path, cfg.config_path / '_proc'
    shutil.rmtree(proc, ignore_errors=True)
    proc.mkdir()
    sources = sorted(nbglob(as_path=True), key=lambda p: p.relative_to(nbs).as_posix())
    os.chdir(nbs)
    pages = [process(f.resolve(), nbs.resolve(), proc) for f in sources]
    for name in ('_quarto.yml', 'nbdev.yml', 'styles.css'):
        shutil.copy2(nbs / name, proc / name)
    side = {'website': {'sidebar': {'contents': sidebar(pages)}}}
    (proc / 'sidebar.yml').write_text(yaml.safe_dump(side, sort_keys=False), encoding='utf-8')
    site = build(str(proc))
    dest = cfg.doc_path
    shutil.rmtree(dest, ignore_errors=True)
    shutil.move(proc / dest.name, dest)
    offline(dest)
    for w in site.warnings:
        print('warning:', w)
    print('site in', dest.relative_to(cfg.config_path))


if __name__ == '__main__':
    main()
