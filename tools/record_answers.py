"""Keep what every model of a recorded run of the tiny world (tools/record_run.py) answered to a few items, for the
site's page of answers: nbs/recorded/answers.json.

Nothing is built or generated but the benchmarks' items. Of each benchmark those on which the models differ most are
shown, so that no hand chooses them.
"""
import argparse
import json
from pathlib import Path

import pandas as pd

from solar_repro.paper import TITLES
from solar_repro.pipeline.experiment import Experiment
from solar_repro.pipeline.results import answer_in_words

ROOT = Path(__file__).resolve().parents[1]
SHOWN = dict(gsm8k=3, truthfulqa=2, arc=1, hellaswag=1, mmlu=1, winogrande=1)     # benchmark -> items


def question(prompt: str) -> str:
    "What is asked, without the worked examples before it and the words that ask for an answer."
    return prompt.strip().split('\n\n')[-1].removesuffix('Answer:').removeprefix('Question:').strip()


def answers_of(exp: Experiment, task: str, n: int) -> list[dict]:
    "The items of a benchmark on which the models differ most, with what each said."
    items = {m: exp.items(m, task).set_index('doc_id') for m in exp.models}
    docs, requests = exp.requests(task)
    spread = pd.DataFrame({m: x['score'] for m, x in items.items()}).std(axis=1)
    found = []
    for i in spread.sort_values(ascending=False, kind='stable').index[:n]:
        said = {m: answer_in_words(task, docs[i], x.loc[i]) for m, x in items.items()}
        scores = {m: round(float(x.loc[i, 'score']), 2) for m, x in items.items()}
        right = next(iter(said.values()))[1]
        asked = question(requests[i][0].args[0])
        found.append(dict(task=TITLES.get(task, task), item=int(i), prompt=asked, right=right,
                          said={m: a.strip() for m, (a, _) in said.items()}, score=scores))
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--seed', type=int, default=0, help='of the recorded run')
    ap.add_argument('--out', type=Path, default=ROOT / 'nbs' / 'recorded' / 'answers.json')
    args = ap.parse_args()
    exp = Experiment('tiny', args.seed, recorded=True)
    items = [x for t, n in SHOWN.items() for x in answers_of(exp, t, n)]
    kept = dict(label=f'{exp.profile.label}, seed {args.seed}', items=items)
    args.out.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    print(f'{len(kept["items"])} items, {len(exp.models)} models: {args.out}')


if __name__ == '__main__':
    main()
