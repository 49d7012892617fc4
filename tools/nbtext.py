"Edit notebooks as text: `nbtext.py out [nbs/X.ipynb ...]` writes .txt/X.py, `nbtext.py in [...]` takes the edits back."
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / '.txt'


def notebooks(named: list[str]) -> list[Path]:
    "The notebooks named, or all; paths below nbs/."
    if named:
        return [Path(n).resolve() for n in named]
    return sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if not p.name.startswith('_'))


def run(*args) -> None:
    program, *rest = args                                   # beside this Python, whether its folder is on PATH or not
    subprocess.run([str(Path(sys.executable).parent / program), *map(str, rest)], check=True, cwd=ROOT)


def main() -> None:
    if sys.argv[1:2] not in (['out'], ['in']):
        sys.exit(f'nbtext: got {sys.argv[1:]}; expected `out` or `in`, then notebooks or nothing for all')
    for nb in notebooks(sys.argv[2:]):
        text = TEXT / nb.relative_to(ROOT / 'nbs').with_suffix('.py')
        text.parent.mkdir(parents=True, exist_ok=True)
        if sys.argv[1] == 'out':
            run('jupytext', '--quiet', '--to', 'py:percent', '-o', text, nb)
        elif text.exists():                                 # --update: cell ids, and so the exported files, stay
            run('jupytext', '--quiet', '--update', '--to', 'ipynb', '-o', nb, text)
    if sys.argv[1] == 'in':
        run('nbdev_clean')


if __name__ == '__main__':
    main()
