"""Contamination at the paper's size: the stage itself, with 300K training rows in five sets
against 28K items of six benchmarks.

    python benchmarks/contamination.py [--data DIR] [--rows 300000] [--out NAME]

What is timed is `stages.builders.build_contamination` in a process of its own, from the files of its inputs to the
table in the store: reading, normalising, runs of 13 and of 8 words, counting.
The five sets have the paper's shares of the rows, and the six benchmarks the leaderboard's numbers of items. With
--data the texts are published ones of that folder, drawn with
replacement up to these sizes; without it they are made of 60 000 words, drawn as English draws them (Zipf), as long as
published rows are and as often not plain ASCII.
In both, one training row in a thousand holds an item whole, and each such pair has to be found. The promise is 5
minutes and 4 GiB on two cores.
--out writes results/NAME.json, one entry a source of texts, and the page NAME.md.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from kept import keep, RESULTS

from solar_repro.core.contamination import BREAK
from solar_repro.core.data_files import read_rows
from solar_repro.data import BENCHMARKS, SETS, item_text
from solar_repro.stages.sources import Published

ROWS, PROMISE_S, PROMISE_GIB = 300_000, 300, 4.
# words of the fields of a row as in samples of the published sets; of an item: its question and one choice
LENGTHS = dict(
    alpaca_gpt4=(25, 100),
    openorca=(640, 225),
    synth_math_instruct=(50, 90),
    ultrafeedback_clean=(110, 190, 190),
    synth_math_alignment=(50, 90, 90),
)
ITEMS = dict(arc=(24, 5), hellaswag=(40, 25), mmlu=(40, 9), truthfulqa=(12, 10), winogrande=(20,), gsm8k=(46, 55))
ACCENTED = .2 # share of rows with a letter beyond ASCII


class Maker:
    "Texts of words drawn by Zipf's law."
    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.words = [f'w{i:x}' for i in range(60_000)]
        self.weights, total = [], 0.
        for i in range(len(self.words)): total += 1/(i + 1); self.weights.append(total)

    def text(self, n: int) -> str:
        t = ' '.join(self.rng.choices(self.words, cum_weights=self.weights, k=self.rng.randint(n//2 or 1, n*3//2)))
        return f'{t} naïve' if self.rng.random() < ACCENTED else t

    def row(self, name: str) -> dict:
        fields = ('prompt', 'completion') if SETS[name].role == 'instruction' else ('prompt', 'chosen', 'rejected')
        return {k: self.text(n) for k, n in zip(fields, LENGTHS[name])}

    def item(self, task: str) -> dict:
        n = ITEMS[task]
        choices = [self.text(n[1]) for _ in range(4)] if len(n) > 1 else []
        if task == 'winogrande':
            return dict(sentence=f'{self.text(n[0])} _ {self.text(3)}', option1='a cup', option2='a hat', answer='1')
        if task == 'gsm8k': return dict(question=self.text(n[0]), answer=f'{choices[0]}\n#### 7')
        shape = dict(
            arc=dict(choices=dict(text=choices)),
            hellaswag=dict(endings=choices),
            mmlu=dict(choices=choices),
            truthfulqa=dict(mc2_targets=dict(choices=choices)),
        )
        return {'ctx' if task == 'hellaswag' else 'question': self.text(n[0]), **shape[task]}


class Drawer:
    "Published texts of a folder, drawn with replacement."
    def __init__(self, seed: int, folder: Path):
        self.rng, source = random.Random(seed), Published(folder, max_broken=2)
        self.rows = {s: [r for _, r in source.candidates(s)[0]] for s in SETS}
        self.items = {t: [r for _, r in source.read(b.files[-1])] for t, b in BENCHMARKS.items()}

    def row(self, name: str) -> dict: return dict(self.rng.choice(self.rows[name]))
    def item(self, task: str) -> dict: return self.rng.choice(self.items[task])


def make(folder: Path, source: Maker|Drawer, n_rows: int, n_items: int) -> dict:
    "Write the inputs of the stage; what was planted, and how much text there is."
    rng, all_used, all_items = (
        random.Random(1),
        sum(s.n_used for s in SETS.values()),
        sum(b.sizes.n for b in BENCHMARKS.values()),
    )
    items, planted, words, at = {}, [], 0, 0
    for t, b in BENCHMARKS.items():
        items[t] = [source.item(t) for _ in range(b.sizes.n*n_items//all_items)]
        (folder/'bench'/t).mkdir(parents=True)
        with open(folder / 'bench' / t / 'test.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + '\n' for r in items[t])
    findable = [
        (t, i)
        for t, rows in items.items()
        for i, r in enumerate(rows)
        if max(len(x.split()) for x in item_text(t, r).split(BREAK)) >= 26
    ]
    for s, d in SETS.items():
        (folder/'data'/s).mkdir(parents=True)
        with open(folder/'data'/s/'rows.jsonl', 'w', encoding='utf-8') as f:
            for i in range(d.n_used*n_rows//all_used):
                row, at = source.row(s), at + 1
                if at % 1000 == 0:
                    t, k = rng.choice(findable); planted.append((s, t, k))
                    row['prompt'] += '\n' + item_text(t, items[t][k]).replace(BREAK, '\n').upper()
                words += sum(len(x.split()) for x in row.values())
                f.write(json.dumps(row, ensure_ascii=False) + '\n')
    return dict(rows=at, items=sum(map(len, items.values())), words=words, planted=planted)


def timed(folder: str, out: str, answer) -> None:
    "The stage in this process; seconds and the largest memory."
    from solar_repro.stages.builders import build_contamination
    inputs = {
        f'{p.parent.name}/{p.name}': SimpleNamespace(path=p)
        for kind in ('data', 'bench')
        for p in sorted((Path(folder) / kind).iterdir())
    }
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, time.perf_counter()
    build_contamination(Path(out), {}, inputs, None)
    answer.put((time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, before))


PAGE = """# Contamination at the paper's size

The stage `contamination` on two CPU cores that did nothing else: {rows:,} training rows in five sets against \
{items:,} items of six benchmarks, from the files of its inputs to the table in the store. The promise
is 5 minutes and 4 GiB. One process does it, on one core; the memory is that of the whole process, {start} GiB of it \
before the stage begins.

| texts | words in the rows | seconds | rows a second | peak, GiB | planted copies found | items that share 13 words \
| 8 words |
|---|---|---|---|---|---|---|---|
{lines}

*made*: words drawn by Zipf's law, all of them words that items have, so that no run is dropped early. *published*: \
rows and items of the folder of samples, drawn with replacement up to these sizes, so copies and
common phrases are there as often as in the sets, but words fewer than in the whole sets. {verdict}

Repeat: `python benchmarks/contamination.py --out contamination` and the same with `--data DIR` (each replaces its \
line).
"""


def page(found: dict) -> str:
    line = lambda k, r: (
        f"| {k} | {r['words']/1e6:.0f} million | {r['seconds']:.0f} | {r['rows']/r['seconds']:,.0f} |"
        f" {r['peak_gib']:.2f} | {r['found']} of {r['planted']} | {r['items_sharing']['13']:,} |"
        f" {r['items_sharing']['8']:,} |"
    )
    ok = all(kept(r) for r in found.values())
    one = next(iter(found.values()))
    return PAGE.format(
        lines='\n'.join(line(k, r) for k, r in sorted(found.items())),
        start=f"{one['start_gib']:.2f}",
        rows=one['rows'],
        items=one['items'],
        verdict='The promise is kept.' if ok else '**The promise is not kept.**',
    )


def kept(r: dict) -> bool:
    return r['seconds'] <= PROMISE_S and r['peak_gib'] <= PROMISE_GIB and r['found'] == r['planted']


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', type=Path); p.add_argument('--rows', type=int, default=ROWS); p.add_argument('--out')
    a = p.parse_args()
    import pandas as pd
    with tempfile.TemporaryDirectory() as d:
        n_items = sum(b.sizes.n for b in BENCHMARKS.values())*a.rows//ROWS
        made = make(Path(d)/'in', Drawer(0, a.data) if a.data else Maker(0), a.rows, n_items)
        (Path(d)/'out').mkdir()
        context = multiprocessing.get_context('spawn'); answer = context.Queue()
        child = context.Process(target=timed, args=(f'{d}/in', f'{d}/out', answer)); child.start()
        seconds, peak, before = answer.get(timeout=1800); child.join()
        found = pd.read_parquet(f'{d}/out/overlaps.parquet')
        texts = {t: [item_text(t, r) for r in read_rows(Path(d)/'in'/'bench'/t/'test.jsonl')] for t in BENCHMARKS}
    have = set(found.loc[found['n'] == 13, ['set', 'task', 'doc_id']].itertuples(index=False, name=None))
    out = dict(
        rows=made['rows'],
        items=sum(map(len, texts.values())),
        words=made['words'],
        seconds=seconds,
        peak_gib=peak,
        start_gib=before,
        planted=len(made['planted']),
        found=sum(x in have for x in made['planted']),
        items_sharing={str(n): len(g[['task', 'doc_id']].drop_duplicates()) for n, g in found.groupby('n')},
    )
    print(json.dumps(out, indent=1))
    if a.out:
        path = RESULTS/f'{a.out}.json'
        both = (json.loads(path.read_text()) if path.is_file() else {}) | {'published' if a.data else 'made': out}
        keep(a.out, page(both), both)
    return int(not kept(out))


if __name__ == '__main__': sys.exit(main())
