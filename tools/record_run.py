"""Put a run on the front page: `record_run.py [--profile tiny] [--tables-minutes N] [--test-minutes N]` reads what
`make tables` left in runs/ and writes figures into nbs/recorded/ and the part of nbs/index.ipynb between its marks;
README.md follows."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd

from keep_outputs import small

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = '<!-- recorded by tools/record_run.py -->', '<!-- end of what is recorded -->'
SHOWN = 4                                                   # the table whose picture stands on the front page


def minutes(seconds: float) -> str:
    return (
        f'{seconds:.0f} s'
        if seconds < 90
        else f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'
    )


def text_of(profile: str, nbs: Path, tables_minutes: float | None = None, test_minutes: float | None = None) -> str:
    "The recorded part: what was run, how long it took, two pictures, five tables."
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.tables import finding
    exp = Experiment(profile)
    status = exp.status()
    missing = status.loc[status['state'] == 'missing', 'stage'].tolist()
    if missing or not (exp.folder / 'report.html').exists():
        sys.exit(
            f'record_run: {len(missing)} stages of {profile} are missing ({missing[:3]} ...); expected a whole run. Run'
            f' `make tables PROFILE={profile}` first.'
        )
    (nbs / 'recorded').mkdir(exist_ok=True)
    for png in sorted((exp.folder / 'figures').glob('*.png')):
        (nbs / 'recorded' / png.name).write_bytes(small(png.read_bytes()))
    tables = {n: pd.read_csv(exp.folder / 'tables' / f'table{n}.csv') for n in range(3, 8)}
    alt = '. '.join(finding(SHOWN, tables[SHOWN], exp.label, exp.samples()).splitlines())
    tables_took = f' `make tables`, notebooks and all, took {tables_minutes:.0f} minutes.' if tables_minutes else ''
    took = (
        f'Building all {len(status)} stages took {minutes(status["seconds"].sum())} on {os.cpu_count()} CPU cores,'
        ' without a GPU.'
        if exp.profile.machine.device == 'cpu'
        else f'Building all {len(status)} stages took {minutes(status["seconds"].sum())} on one GPU.'
    )
    tests = f' `make test` took {test_minutes:.0f} minutes.' if test_minutes else ''
    numbers = '\n\n'.join((exp.folder / 'tables' / f'table{n}.md').read_text(encoding='utf-8').strip() for n in tables)
    return '\n\n'.join(
        [
            f'A recorded run: **{exp.label}**, not SOLAR 10.7B. {took}{tables_took}{tests}',
            f'<p><img src="recorded/table{SHOWN}.png" alt="{alt}"></p>',
            (
                '<p><img src="recorded/claims.png" alt="Each claim of section 4.3 with its verdict on the paper\'s'
                ' numbers and on ours"></p>'
            ),
            f'<details>\n<summary>Tables 3 to 7 in numbers</summary>\n\n{numbers}\n\n</details>',
        ]
    )


def put(notebook: Path, text: str) -> None:
    "Replace what stands between the marks."
    nb = nbformat.read(notebook, 4)
    cell, = [c for c in nb.cells if BEGIN in c.source]
    cell.source = re.sub(
        f'{re.escape(BEGIN)}.*?{re.escape(END)}', lambda _: f'{BEGIN}\n\n{text}\n\n{END}', cell.source, flags=re.S
    )
    nbformat.write(nb, notebook)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--profile', default='tiny')
    ap.add_argument(
        '--tables-minutes', type=float, help='what `make tables` took from an empty store, to be said beside it'
    )
    ap.add_argument('--test-minutes', type=float, help='what `make test` took, to be said beside it')
    ap.add_argument('--nbs', type=Path, default=ROOT / 'nbs', help='the notebooks to write into (default: nbs/)')
    args = ap.parse_args()
    put(args.nbs / 'index.ipynb', text_of(args.profile, args.nbs, args.tables_minutes, args.test_minutes))
    if args.nbs.resolve() == ROOT / 'nbs':
        subprocess.run([str(Path(sys.executable).parent / 'nbdev_clean')], check=True, cwd=ROOT)
        subprocess.run([sys.executable, ROOT / 'tools' / 'build_readme.py'], check=True)


if __name__ == '__main__':
    main()
