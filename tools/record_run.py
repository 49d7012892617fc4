"""Record runs: `record_run.py --store STORE --seeds 0,1,2 [--profile tiny] [--kind NAME]` takes finished runs out of a
store, one file a seed, into solar_repro/recorded/PROFILE/KIND/, from where the package shows them without running
anything. KIND is the kind of processor, by default the instructions that the runs used. With or without new runs, the
recorded ones of the tiny world then go onto the front page: figures into nbs/recorded/, and the part of
nbs/index.ipynb between its marks; README.md follows."""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import nbformat

from keep_outputs import small

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = '<!-- recorded by tools/record_run.py -->', '<!-- end of what is recorded -->'
FOUND = '<!-- found by tools/record_run.py -->', '<!-- end of what was found -->'     # the sentences above the commands
TOLD = '<!-- told by tools/record_run.py -->', '<!-- end of what was told -->'         # what stands behind them
TIMES = ROOT / 'benchmarks' / 'results' / 'commands.json'          # minutes that whole commands took, set-up included
FRONT = 'tiny'                                              # the profile whose runs stand on the front page
SHOWN = 4                                                   # the table that stands on the front page, above its picture


def record(
    profile: str, seed: int, store: Path, into: Path, kind: str | None = None, points: int = 11
) -> Path:
    "A finished run as one file; the line between the candidates with it, where that is scored, too."
    from solar_repro.pipeline.experiment import Experiment, USES_BASE
    from solar_repro.pipeline.results import in_a_line, makers, read_record, scale, taught, write_record
    from solar_repro.pipeline.sweep import between, CANDIDATES, is_built
    exp = Experiment(profile, seed=seed, store=store)
    status = exp.status()
    missing = status.loc[status['state'] == 'missing', 'stage'].tolist()
    if missing:
        sys.exit(
            f'record_run: {len(missing)} stages of {profile}, seed {seed}, are missing in {store} ({missing[:3]} ...);'
            f' expected a whole run. Run `solar-repro run --profile {profile} --seed {seed} --store {store}` first.'
        )
    swept, line = between(exp, *CANDIDATES, points)
    whole, of_line = (swept, line['model'].unique()) if is_built(swept, line) else (exp, ())
    rows = list(dict.fromkeys([*exp.models, *of_line]))
    evaluations = {(m, t): f'eval/{m}/{t}' for m in rows for t in exp.tasks}
    manifests = {n: whole.find(n).manifest for n in dict.fromkeys([*exp.graph, *evaluations.values()])}
    of = makers([m for n, m in manifests.items() if whole.graph[n].kind in USES_BASE])
    if len(of) != 1:
        sys.exit(
            f'record_run: made on {in_a_line(of)}; expected one machine and one set of libraries. '
            'Run it again into a store of its own.'
        )
    (made,) = of
    trainings = [m for n, m in manifests.items() if whole.graph[n].kind in ('sft', 'dpo')]    # of this seed alone
    how = dict.fromkeys(x.lower() for x in (made.get('capability'), made.get('MKL_CBWR')) if x)
    facts = dict(
        profile=exp.profile.name, label=scale(exp), seed=seed, protocol=exp.profile.eval.protocol, made_on=made,
        started=min(m['started'] for m in trainings), seconds=round(float(status['seconds'].sum()), 1),
        stages=exp.provenance().to_dict('records'), taught=json.loads(taught(exp).to_json(orient='records')),
    )
    file = into / exp.profile.name / (kind or '-'.join(how) or 'cpu') / f'seed{seed}.json.gz'
    there = read_record(file)['made_on'] if file.exists() else made
    if there.get('processor') != made.get('processor'):
        sys.exit(
            f'record_run: {file.relative_to(into)} is of {there.get("processor")}, this run of {made.get("processor")};'
            ' expected one processor a kind. Give this one a name of its own: --kind NAME, or make record KIND=NAME.'
        )
    return write_record(file, facts, {k: whole.find(n).path for k, n in evaluations.items()})


def minutes(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds / 60:.0f} minutes'


def replicated(profile: str) -> list[str]:
    "How many verdicts other seeds and another kind of processor give alike, a line of a table each."
    from solar_repro.pipeline.results import kinds_in_words, replications, replications_in_words
    found = replications(profile)
    if not found:
        return []
    kinds = f'Kinds of processor take sums in another order: {kinds_in_words(profile)}.'
    return ['Do the verdicts replicate?', replications_in_words(found), kinds]


@cache
def sets_of(profile: str):
    "How verdicts of separate sets of the recorded trainings agree, by their size: `tables.by_trainings`."
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.tables import by_trainings
    return by_trainings(Experiment(profile, recorded=True).samples())


def in_short(profile: str) -> str:
    "In three sentences what the paper's numbers tell, what the recorded runs say, and what replicates."
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.publishing.report import paper_in_words
    from solar_repro.publishing.text import counted
    from solar_repro.tables import MIN_SEEDS
    exp = Experiment(profile, recorded=True)
    found, n = exp.claims().found, len(exp.records)
    over = 'items' if n == 1 else f'items and {n} trainings'
    said = f'Over {over} the recorded runs of the {exp.profile.label} {counted(found, "on_ours")}.'
    again = ''
    if n > 1:
        first, *_, last = sets_of(profile).itertuples()
        worst = sets_of(profile)['opposite'].max()                      # of sets of any size
        opposite = f'up to {worst} are' if worst else 'none is'
        again = (f' Two sets of these trainings without a seed in common agree on {first.agree:.1f} of the {len(found)}'
                 f' verdicts with one training in each and on {last.agree:.1f} with {last.trainings}, and {opposite}'
                 f' opposite: a verdict on fewer than {MIN_SEEDS} trainings is provisional here.')
    paper = paper_in_words(found)
    return f'**In short.** {paper[0].upper()}{paper[1:]}. {said}{again}'


def at_length(profile: str) -> str:
    "Which row is best and how it stands to the base, how large chance is, how agreement grows with trainings."
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.pipeline.results import records, replications
    from solar_repro.publishing.report import summary
    from solar_repro.tables import alike, claims
    exp = Experiment(profile, recorded=True)
    scores, samples = exp.scores(), exp.samples()
    _, best, chance, *_ = summary(scores, exp.label, claims(scores, samples=samples), exp.custom, samples)
    said = []
    if len(exp.records) > 1:
        sets = [f'{x.agree:.1f} with {x.trainings}' for x in sets_of(profile).itertuples()]
        said.append(f'Of the verdicts of two sets of trainings so many agree: {", ".join(sets)} in each set.')
    main = next(iter(records(profile)))                                 # of the runs that tables are of
    for r in replications(profile):
        (kind, seeds), (of, others) = (c.split(', ', 1) for c in r.columns[1:3])
        if kind == main != of:                                          # and by one other kind of processor
            said.append(f'Of {seeds} on one kind of processor ({kind}) and {others} on another ({of}) '
                        f'{alike(r)}.')
            break
    return ' '.join([f'**What the tiny world says.** {best} {chance}', *said])


def times() -> str:
    "What whole commands took, as a range over the machines that they were timed on."
    seen = json.loads(TIMES.read_text(encoding='utf-8'))
    def span(m): # of one measurement no range
        if len(m) == 1: return f'{m[0]:.0f} minutes (measured once)'
        return ' to '.join(dict.fromkeys([f'{math.floor(min(m))}', f'{math.ceil(max(m))}'])) + ' minutes'
    said = [f'`{command}` took {span(m)}' for command, m in seen['minutes'].items()]
    *first, last = said
    return f' On {seen["machines"]}, set-up included, {" and ".join(filter(None, [", ".join(first), last]))}.'


def text_of(profile: str, nbs: Path) -> str:
    "The part of the front page: a table and its picture, what was run and on what, what replicates, other tables."
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.publishing.report import publish
    from solar_repro.tables import finding
    exp = Experiment(profile, recorded=True)
    samples = exp.samples()
    (nbs / 'recorded').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as d:
        publish(exp.scores(), Path(d), exp.label, exp.provenance(), exp.custom, samples, exp.made_on())
        for png in sorted(Path(d).glob('figures/*.png')):
            (nbs / 'recorded' / png.name).write_bytes(small(png.read_bytes()))
        numbers = {n: (Path(d) / 'tables' / f'table{n}.md').read_text(encoding='utf-8').strip() for n in range(3, 8)}
    unfolded = numbers.pop(SHOWN)
    alt = '. '.join(finding(SHOWN, exp.table(SHOWN), exp.label, samples).splitlines())
    quiet = min(exp.records.values(), key=lambda r: r['seconds'])       # the others shared the machine with more
    stages, took = len(quiet['stages']), minutes(quiet['seconds'])
    return '\n\n'.join(
        [
            unfolded,
            f'<p><img src="recorded/table{SHOWN}.png" alt="{alt}"></p>',
            f'Recorded runs: **{exp.label}**, not SOLAR 10.7B, on {exp.made_on()}. All {stages} stages of one'
            f' seed took {took} of one processor where least else ran.{times()} A run of your own says of'
            ' itself what made it;'
            ' on another processor its sums are rounded otherwise, and its scores differ as those of another seed do.',
            (
                '<p><img src="recorded/claims.png" alt="Each claim of section 4.3 with its verdict on the paper\'s'
                ' numbers and on ours"></p>'
            ),
            *replicated(profile),
            '<details>\n<summary>The other four tables in numbers</summary>\n\n'
            + '\n\n'.join(numbers.values()) + '\n\n</details>',
        ]
    )


def put(notebook: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    "Replace what stands between two marks."
    nb = nbformat.read(notebook, 4)
    cell, = [c for c in nb.cells if begin in c.source]
    cell.source = re.sub(
        f'{re.escape(begin)}.*?{re.escape(end)}', lambda _: f'{begin}\n\n{text}\n\n{end}', cell.source, flags=re.S
    )
    nbformat.write(nb, notebook)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--profile', default='tiny')
    ap.add_argument('--seeds', help='record the finished runs of these seeds, such as 0,1,2')
    ap.add_argument('--store', type=Path, default=ROOT / 'runs' / 'store', help='where they lie (default: runs/store)')
    ap.add_argument('--kind', help='name of the kind of processor (default: the instructions that were used)')
    ap.add_argument('--nbs', type=Path, default=ROOT / 'nbs', help='the notebooks to write into (default: nbs/)')
    args = ap.parse_args()
    for seed in (args.seeds or '').replace(',', ' ').split():
        print(record(args.profile, int(seed), args.store, ROOT / 'solar_repro' / 'recorded', args.kind))
    if args.profile != FRONT:
        return
    put(args.nbs / 'index.ipynb', text_of(args.profile, args.nbs))
    put(args.nbs / 'index.ipynb', in_short(args.profile), *FOUND)
    put(args.nbs / 'index.ipynb', at_length(args.profile), *TOLD)
    if args.nbs.resolve() == ROOT / 'nbs':
        subprocess.run([str(Path(sys.executable).parent / 'nbdev_clean')], check=True, cwd=ROOT)
        subprocess.run([sys.executable, ROOT / 'tools' / 'build_readme.py'], check=True)


if __name__ == '__main__':
    main()
