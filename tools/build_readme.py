"Write README.md from nbs/index.ipynb: prose as it stands, code as fenced blocks; --check only compares."
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cell_text(cell: dict) -> str:
    "One cell as markdown; directives and empty cells give nothing."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':                     # pictures lie beside the notebook
        return source.strip().replace('src="recorded/', 'src="nbs/recorded/')
    source = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    return f'```python\n{source}\n```' if cell['cell_type'] == 'code' and source else ''


def render(notebook: Path) -> str:
    "The notebook as one page of markdown, code cells shown, outputs left out."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    note = '<!-- written by tools/build_readme.py from nbs/index.ipynb: edit that -->'
    return '\n\n'.join([note, *(t for c in cells if (t := cell_text(c)))]) + '\n'


def main() -> None:
    text, readme = render(ROOT / 'nbs' / 'index.ipynb'), ROOT / 'README.md'
    if '--check' in sys.argv[1:]:
        if readme.read_text(encoding='utf-8') != text:
            sys.exit('README.md is not what nbs/index.ipynb gives; run tools/build_readme.py')
    else:
        readme.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
