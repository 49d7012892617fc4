"Run a notebook with papermill and keep its outputs in nbs/: `run_nb.py nbs/X.ipynb ... [-p name value]`, or `--all`."
import argparse
import os
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
ENV = dict(GOMP_SPINCOUNT='30000', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', SOLAR_PROGRESS=os.devnull)


def execute(source: Path, out: Path, parameters: list[list[str]]) -> None:
    "Run `source` into `out`; a notebook without kernel metadata runs under python3."
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = [x for name, value in parameters for x in ('-p', name, value)]
    cmd = [sys.executable, '-m', 'papermill', str(source), str(out), '-k', 'python3',
           '--no-progress-bar', '--log-level', 'WARNING', *flags]
    env = {k: v for k, v in os.environ.items() if k not in ('MPLBACKEND', 'IN_TEST')}       # figures stay in the page
    subprocess.run(cmd, check=True, cwd=source.parent, stdin=subprocess.DEVNULL, env=env | ENV)


def take_outputs(source: Path, done: Path) -> None:
    "Copy outputs back by cell id: the source keeps its own cells, tags and parameters."
    nb, new = nbformat.read(source, 4), {c.id: c for c in nbformat.read(done, 4).cells}
    for c in nb.cells:
        if c.cell_type == 'code':
            c.outputs = new[c.id].outputs
    nbformat.write(nb, source)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('notebooks', nargs='*', type=Path, help='notebooks below nbs/')
    ap.add_argument('--all', action='store_true', help='every notebook, in order')
    ap.add_argument('-p', dest='parameters', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'))
    args = ap.parse_args()
    if args.all == bool(args.notebooks):
        ap.error('name the notebooks, or give --all')
    found = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if not p.name.startswith(('_', '.')) and '.ipynb_checkpoints' not in p.parts)
    notebooks = found if args.all else [p.resolve() for p in args.notebooks]
    for k, source in enumerate(notebooks, 1):
        name = source.relative_to(ROOT / 'nbs')
        print(f'[{k}/{len(notebooks)}] {name}', flush=True)
        done = ROOT / 'runs' / 'outputs' / name
        execute(source, done, args.parameters)
        take_outputs(source, done)
    subprocess.run([str(Path(sys.executable).parent / 'nbdev_clean')], check=True, cwd=ROOT)


if __name__ == '__main__':
    main()
