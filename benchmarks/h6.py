"""Our scoring backend against lm-eval's own (`HFLM`): the same items in one process, a line a benchmark.

    python benchmarks/h6.py [--items 4] [--mmlu_items 16] [--tasks arc mmlu] [--hf_batch 1 8] [--hf_packed] [--shape
    smollm2-135m] [--device cpu] [--dtype float32] [--out NAME]
    python benchmarks/h6.py --profile smol [--leaderboard_shots] [...]

The model has random weights and the shape of a known one, so that nothing is fetched; or it is the base of a profile,
asked the first items of that profile: real weights and published items for `smol`. Otherwise items are random words,
as long as those of the real benchmarks are on average in tokens (LENGTHS); shots are the leaderboard's (25, 10, 5, 0
with the six fixed pairs, 5, 5) and drawn by lm-eval's default sampler, other examples for each item except in MMLU,
whose items are all of one subject: its real subjects have 246 items on average, so few items understate what sharing
its examples saves, and `--mmlu_items` may ask for more of them. Two ratios are given: of the times as measured, and
with each task's time an item multiplied by the items of its real test set (SIZES), which is what H6 costs.

A random model never writes a stop string, so GSM8K generates all its 256 tokens; and greedy texts of a random model
soon go in circles, which our backend's guesses of what comes next follow better than they follow real answers. So
GSM8K is also timed without guesses, and a second pair of ratios counts that; a profile's base shows what they are
worth on text that a trained model writes.

Each backend answers one request first, to warm up. A hook counts tokens that go through the model and positions that
get logits, padding included. On a CPU our backend multiplies float32 matrices of large models with oneDNN, HFLM with
what torch takes (MKL); `--hf_packed` lets HFLM's products go the same way as ours, and what is left of the ratio is
then due to other things. The share of the matmul rate is the time that the model's matrix products take by
themselves, each shape timed alone in the same process with the faster of the two libraries, divided by the time
measured (other work on the machine moves it either way); attention over cached keys is left out of it. With several
sizes of HFLM's batch the fastest counts, task by task.
"""

import argparse
import logging
import os
import random
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

for k, v in dict(
    OMP_WAIT_POLICY='PASSIVE', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', PYTHONWARNINGS='ignore'
).items():
    os.environ.setdefault(k, v)
sys.path.insert(0, str(Path(__file__).resolve().parent))

from kept import command, keep                                                 # noqa: E402
from shapes import LLAMA_1B, SMOLLM2_135M, SOLAR, llama, random_llama          # noqa: E402

SHAPES = {
    'smoke': llama(64, 128, 2, 4, 2, 2048, True), 'smollm2-135m': SMOLLM2_135M, 'llama-1b': LLAMA_1B,
    'solar-10.7b': SOLAR,
}
SHOTS = dict(arc=25, hellaswag=10, mmlu=5, truthfulqa=0, winogrande=5, gsm8k=5)
SIZES = dict(
    arc=1172, hellaswag=10042, mmlu=14042, truthfulqa=817, winogrande=1267, gsm8k=1319
)  # items of the test sets
LENGTHS = dict(
    arc=(26, 6), hellaswag=(45, 28), mmlu=(45, 12), truthfulqa=(13, 11), winogrande=(12, 10), gsm8k=(60, 120)
)  # words of question and answer


def words(rng: random.Random, vocab: list[str], mean: int) -> str:
    return ' '.join(rng.choice(vocab) for _ in range(max(1, round(rng.uniform(0.5, 1.5) * mean))))


def row(task: str, rng: random.Random, vocab: list[str], preamble: str) -> dict:
    "One item in the hub's columns."
    q, a = LENGTHS[task]
    say = lambda n: words(rng, vocab, n)
    if task == 'arc':
        return dict(
            id='1', question=say(q), choices=dict(text=[say(a) for _ in range(4)], label=list('ABCD')), answerKey='B'
        )
    if task == 'hellaswag':
        return dict(activity_label=say(2), ctx=say(q), endings=[say(a) for _ in range(4)], label='1')
    if task == 'mmlu':
        return dict(subject='botany', question=say(q), choices=[say(a) for _ in range(4)], answer=1)
    if task == 'winogrande':
        return dict(sentence=f'{say(q)} _ {say(a)}', option1=say(2), option2=say(2), answer='1')
    if task == 'gsm8k':
        return dict(question=say(q), answer=f'{say(a)} #### 7')
    n = rng.randint(4, 11)
    return dict(
        question=preamble + say(q),
        mc2_targets=dict(choices=[say(a) for _ in range(n)], labels=[1] * 2 + [0] * (n - 2)),
        plain=[True] * n,
    )


def items(task: str, n: int, vocab: list[str]) -> dict[str, list[dict]]:
    rng = random.Random(f'{task} {n}')
    preamble = ''.join(f'{words(rng, vocab, 9)}\nAnswer: {words(rng, vocab, 11)}\n\nQuestion: ' for _ in range(6))
    return dict(
        train=[row(task, rng, vocab, '') for _ in range(max(SHOTS[task], 60))],
        test=[row(task, rng, vocab, preamble) for _ in range(n)],
    )


def run(lm, requests: list, model) -> dict:
    "Answers, seconds, tokens, positions with logits and products of one backend."
    import torch
    from tiny_tables import products

    seen, count = Counter(), Counter()
    ask = getattr(lm, requests[0].request_type)
    few = [
        replace(
            r,
            arguments=(
                (r.args[0][-300:], dict(r.args[1], max_gen_toks=2)) if r.request_type == 'generate_until' else r.args
            ),
        )
        for r in requests[:1]
    ]
    ask(few, disable_tqdm=True)
    sync = torch.cuda.synchronize if model.device.type == 'cuda' else lambda: None
    hooks = [
        model.register_forward_pre_hook(
            lambda m, a, kw: count.update(tokens=(a[0] if a else kw['input_ids']).numel(), passes=1), with_kwargs=True
        ),
        model.get_output_embeddings().register_forward_hook(
            lambda m, a, out: count.update(logits=out.numel() // out.shape[-1])
        ),
    ]
    try:
        with products(seen):
            sync()
            began, busy = time.perf_counter(), time.process_time()
            answers = ask(requests, disable_tqdm=True)
            sync()
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
    finally:
        for h in hooks:
            h.remove()
    return dict(answers=answers, seconds=seconds, cpu_s=busy, seen=seen, **count)


def onednn_rates(shapes: set) -> dict:
    "Seconds a FLOP of a float32 product of each shape with weights that oneDNN has laid out; none where it is missing."
    import torch

    out, ops = {}, torch.ops.mkldnn
    for rows, i, o in sorted(shapes) if torch.backends.mkldnn.is_available() else ():
        x, w = torch.randn(rows, i), ops._reorder_linear_weight(torch.randn(o, i))
        multiply = lambda: ops._linear_pointwise(x, w, None, 'none', [], '')
        multiply()
        repeat, best = max(1, min(1000, int(2e7 / (rows * i * o)))), float('inf')
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(repeat):
                multiply()
            best = min(best, (time.perf_counter() - began) / repeat)
        out[rows, i, o] = best / (2.0 * rows * i * o)
    return out


def ratios(lines: list[dict], ours: str = 'ours') -> dict:
    "Of the times as measured, of those that whole test sets would take, and of CPU times."
    total = lambda k: sum(l[k] for l in lines)
    whole = lambda k: sum(l[k] * SIZES[l['task']] / l['items'] for l in lines)
    return dict(
        ratio=total('hf_s') / total(f'{ours}_s'),
        ratio_test_sets=whole('hf_s') / whole(f'{ours}_s'),
        worst=min(l['hf_s'] / l[f'{ours}_s'] for l in lines),
        cpu_ratio=total('hf_cpu_s') / total(f'{ours}_cpu_s'),
        cpu_worst=min(l['hf_cpu_s'] / l[f'{ours}_cpu_s'] for l in lines),
    )


def invented(a: argparse.Namespace) -> tuple:
    """Tokenizer, a model with random weights, (task, items) -> requests about random words and their shots, and
    what this is."""
    from solar_repro.eval import build_requests
    from solar_repro.models.loading import load_tokenizer
    from solar_repro.tiny.world import shipped_base

    tok = load_tokenizer(shipped_base())
    vocab = sorted(w for w in tok.get_vocab() if w.isalpha())
    model = random_llama(SHAPES[a.shape], a.dtype, a.device).eval()

    def ask(t, n):
        requests = [r for x in build_requests(t, items(t, n, vocab), SHOTS[t]).tasks for r in x.instances]
        if t == 'gsm8k':
            requests = [replace(r, arguments=(r.args[0], dict(r.args[1], max_gen_toks=a.generate))) for r in requests]
        return requests, SHOTS[t]

    return tok, model, ask, f"{a.shape}'s shape with random weights, asked about random words"


def of_profile(a: argparse.Namespace) -> tuple:
    """Tokenizer, a profile's base, (task, items) -> requests about the first items of the profile and their shots,
    and what this is."""
    import torch
    from solar_repro.core.data_files import read_rows
    from solar_repro.eval import build_requests
    from solar_repro.models.loading import load_tokenizer
    from solar_repro.models.adapters import materialize
    from solar_repro.pipeline.experiment import Experiment

    exp = Experiment(a.profile)
    point = exp.model('base')

    def ask(t, n):
        s, folder = exp.graph[f'eval/base/{t}'].settings, exp.build(f'bench/{t}').path
        bench = {k: read_rows(folder / f'{k}.jsonl') for k in ('train', 'test')}
        shots = SHOTS[t] if a.leaderboard_shots else s['num_fewshot']
        asked = build_requests(t, dict(bench, test=bench['test'][:n]), shots, s.get('tasks', 'tiny'))
        return [r for x in asked.tasks for r in x.instances], shots

    return (
        load_tokenizer(point.base),
        materialize(point, a.device).to(getattr(torch, a.dtype)),
        ask,
        f'the base of profile {exp.profile.name} ({exp.profile.label}), asked its first items',
    )


def theirs(a: argparse.Namespace, t: str, requests: list, model, tok) -> dict[int, dict]: # rows a batch -> what it took
    "A benchmark with HFLM, in each of the batch sizes asked for."
    import torch
    from lm_eval.models.huggingface import HFLM
    from solar_repro.inference.forward import packed
    from solar_repro.models.loading import quiet

    got = {}
    for n in a.hf_batch:
        with quiet(), torch.inference_mode(), packed(model) if a.hf_packed else nullcontext():
            got[n] = run(HFLM(pretrained=model, tokenizer=tok, batch_size=n), requests, model)
        print(f'  {t}: HFLM, batches of {n}: {got[n]["seconds"]:.1f} s', file=sys.stderr, flush=True)
    return got


def ours_of(a: argparse.Namespace, t: str, requests: list, model, tok) -> tuple[dict, dict]:
    "A benchmark with our backend, and the same without guesses of what comes next."
    from solar_repro.inference.lm import RequestEncoder, SharedPrefixLM

    ours = run(SharedPrefixLM(model, RequestEncoder(tok), a.batch), requests, model)
    if t != 'gsm8k':
        return ours, ours
    lm = SharedPrefixLM(model, RequestEncoder(tok), a.batch)
    lm.limits = replace(lm.limits, n_idle=0)  # a pass of one token a row is the best
    plain = run(lm, requests, model)
    assert plain['answers'] == ours['answers'] or a.dtype != 'float32', (
        'gsm8k: the texts with guesses and without differ'
    )  # bfloat16 rounds otherwise in wider passes
    return ours, plain


def line(t: str, shots: int, requests: list, got: dict[int, dict], ours: dict, plain: dict) -> dict:
    "One benchmark: what each side took, and how its answers compare."
    best = min(got, key=lambda n: got[n]['seconds'])
    hf, pairs = got[best], list(zip(got[best]['answers'], ours['answers']))
    generated = t == 'gsm8k'
    return dict(
        task=t, shots=shots, items=len({(r.task_name, r.doc_id) for r in requests}), requests=len(requests),
        hf_batch=best, hf_s=hf['seconds'], ours_s=ours['seconds'],
        no_guesses_s=plain['seconds'], no_guesses_cpu_s=plain['cpu_s'], ratio=hf['seconds'] / ours['seconds'],
        hf_cpu_s=hf['cpu_s'], ours_cpu_s=ours['cpu_s'], cpu_ratio=hf['cpu_s'] / ours['cpu_s'],
        hf_tok=hf['tokens'], ours_tok=ours['tokens'],
        hf_passes=hf['passes'], ours_passes=ours['passes'], no_guesses_passes=plain['passes'],
        hf_logits=hf['logits'], ours_logits=ours['logits'],
        max_difference_nats=0.0 if generated else max(abs(x[0] - y[0]) for x, y in pairs),
        equal=sum(x == y if generated else x[1] == y[1] for x, y in pairs),
        hf_s_by_batch={n: g['seconds'] for n, g in got.items()},
    )


def add_shares(lines: list[dict], sides: dict[str, tuple[dict, dict]]) -> None:
    "What share of the time bare products of the same shapes would take."
    from tiny_tables import arithmetic, bucket, time_products

    shapes = {bucket(s) for both in sides.values() for side in both for s in side['seen']}
    rate, other = time_products(shapes), onednn_rates(shapes)
    rate = {s: min(x, other.get(s, x)) for s, x in rate.items()}
    for l in lines:
        for name, side in zip(('hf', 'ours'), sides[l['task']]):
            l[f'{name}_share'] = arithmetic(side['seen'], rate) / side['seconds']


def machine(a: argparse.Namespace) -> str:
    import torch

    if a.device != 'cpu':
        return torch.cuda.get_device_name()
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    return f'{a.threads} of {os.cpu_count()} CPU cores{" with AMX" if "amx_tile" in flags else ""}'


def compare(a: argparse.Namespace) -> dict:
    import torch
    from solar_repro.paper import H6_TASKS

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    tok, model, ask, what = of_profile(a) if a.profile else invented(a)
    lines, sides = [], {}
    for t in a.tasks or H6_TASKS:
        requests, shots = ask(t, a.mmlu_items or a.items if t == 'mmlu' else a.items)
        got = theirs(a, t, requests, model, tok)
        ours, plain = ours_of(a, t, requests, model, tok)
        lines.append(line(t, shots, requests, got, ours, plain))
        sides[t] = got[lines[-1]['hf_batch']], ours
        print(f'  {t}: ours: {ours["seconds"]:.1f} s, ratio {lines[-1]["ratio"]:.2f}', file=sys.stderr, flush=True)
    if a.device == 'cpu':
        add_shares(lines, sides)
    return dict(
        machine=machine(a), load_before=round(a.load, 1), model=what, profile=a.profile, dtype=a.dtype,
        torch=torch.__version__, rows_at_most=a.batch, hf_packed=a.hf_packed, tasks=lines,
        **ratios(lines), no_guesses=ratios(lines, 'no_guesses'),
    )


def show(r: dict) -> str:
    head = (
        f'{"task":<12}{"shots":>6}{"items":>6}{"requests":>9}{"HFLM s":>9}{"batch":>6}{"ours s":>8}{"ratio":>7}'
        f'{"CPU":>7}{"HFLM tok":>10}{"ours tok":>9}{"HFLM log.":>10}{"ours log.":>10}'
        f'{"HFLM mm":>8}{"ours mm":>8}{"max diff":>10}{"equal":>9}'
    )
    out = [
        f"{r['model']}; {r['dtype']}; {r['machine']}, load {r['load_before']} before; torch {r['torch']}"
        + ("; HFLM's products by oneDNN too" if r['hf_packed'] else ''),
        head,
        '-' * len(head),
    ]
    for l in r['tasks']:
        mm = ''.join(f'{l[k]:>8.0%}' if k in l else f'{"":>8}' for k in ('hf_share', 'ours_share'))
        out.append(
            f"{l['task']:<12}{l['shots']:>6}{l['items']:>6}{l['requests']:>9}{l['hf_s']:>9.2f}"
            f"{l['hf_batch']:>6}{l['ours_s']:>8.2f}"
            f"{l['ratio']:>7.2f}{l['cpu_ratio']:>7.2f}{l['hf_tok']:>10}{l['ours_tok']:>9}"
            f"{l['hf_logits']:>10}{l['ours_logits']:>10}{mm}{l['max_difference_nats']:>10.1e}"
            f"{str(l['equal']) + '/' + str(l['requests']):>9}"
        )
    total = lambda k: sum(l[k] for l in r['tasks'])
    out += [
        '-' * len(head),
        (
            f"all {len(r['tasks'])}, these items: {total('hf_s'):.1f} s against {total('ours_s'):.1f} s, ratio"
            f" {r['ratio']:.2f}; the worst task {r['worst']:.2f}; by CPU time {r['cpu_ratio']:.2f} and"
            f" {r['cpu_worst']:.2f}"
        ),
        (
            f"all {len(r['tasks'])}, whole test sets (time an item times"
            f" {', '.join(str(SIZES[l['task']]) for l in r['tasks'])} items): ratio {r['ratio_test_sets']:.2f}"
        ),
    ]
    for l in r['tasks']:
        if l['task'] == 'gsm8k':
            out.append(
                f"gsm8k without guesses of what comes next: {l['no_guesses_passes']} passes instead of"
                f" {l['ours_passes']} (HFLM {l['hf_passes']}), {l['no_guesses_s']:.1f} s, ratio"
                f" {l['hf_s'] / l['no_guesses_s']:.2f}; then all: {r['no_guesses']['ratio']:.2f} and"
                f" {r['no_guesses']['ratio_test_sets']:.2f}, the worst {r['no_guesses']['worst']:.2f}"
            )
    out.append(
        'CPU: ratio of CPU times, which other work on the machine disturbs less; tok: through the model, wrong guesses'
        ' and padding included; log.: positions with logits; mm: share of the rate of the faster of two matmul'
        ' libraries; diff in nats; equal: greedy flags, or texts'
    )
    return '\n'.join(out)


AIM = 4.0  # times as fast over the six tasks together, and no task slower
CLOSE = 1e-4  # nats between two log-likelihoods, at most


def page(r: dict, repeat: str) -> str:
    "The result in words, and as a table."
    rows, least = r['tasks'], min(r['ratio'], r['ratio_test_sets'])
    slower = [l['task'] for l in rows if l['ratio'] < 1]
    same, asked = sum(l['equal'] for l in rows), sum(l['requests'] for l in rows)
    n, far = ', '.join(f"{l['items']} items of {l['task']}" for l in rows), max(l['max_difference_nats'] for l in rows)
    close = f'no log-likelihood differs by more than {far:.1e} nats' + (
        f', which is **more than the {CLOSE:g} that is asked for**' if far > CLOSE else ''
    )
    verdict = (
        f"**The speed aimed at, {AIM:g} times with no task slower, is"
        f" {'' if least >= AIM and not slower and len(rows) == len(SHOTS) else 'not '}reached**: {r['ratio']:.2f} times"
        f" as fast on these items, {r['ratio_test_sets']:.2f} times if each task's time an item is multiplied by the"
        f" items of its test set, and {'no task is slower' if not slower else 'slower in ' + ', '.join(slower)} (worst"
        f" {r['worst']:.2f}); by CPU time, which other work on the machine disturbs less, {r['cpu_ratio']:.2f} times"
        f" (worst {r['cpu_worst']:.2f}). Without guesses of what GSM8K's answers say"
        f" next{'' if r['profile'] else ', which texts of a random model favour'}, it is {r['no_guesses']['ratio']:.2f}"
        f" and {r['no_guesses']['ratio_test_sets']:.2f}."
    )
    products = (
        'Both sides multiply matrices with oneDNN here.'
        if r['hf_packed']
        else (
            "On a CPU part of this is the matrix library: ours is oneDNN with weights laid out beforehand, HFLM's is"
            " what torch takes, and `--hf_packed` gives both sides the former."
        )
    )
    return (
        f"# H6: our backend against HFLM\n\nThe model: {r['model']}; {r['dtype']}, on {r['machine']} (load"
        f" {r['load_before']} before), with {', '.join(str(l['shots']) for l in rows)} shots: {n}. HFLM is timed with"
        f" batches of {' and '.join(map(str, rows[0]['hf_s_by_batch']))}, and the fastest counts, task by"
        f" task.\n\n{same} of {asked} greedy flags and texts are equal, and {close}. {verdict} {products}\n\nRepeat:"
        f" `{repeat}` (the script overwrites this page).\n\n```\n{show(r)}\n```\n"
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='Our backend against HFLM on the six benchmarks.')
    p.add_argument('--items', type=int, default=4, help='items a benchmark')
    p.add_argument('--mmlu_items', type=int, help='items of MMLU, all of one subject; as the others if not given')
    p.add_argument('--tasks', nargs='*', choices=SHOTS, help='only these')
    p.add_argument('--hf_packed', action='store_true', help="HFLM's products by oneDNN too")
    p.add_argument('--hf_batch', type=int, nargs='+', default=[1, 8], help="HFLM's batch sizes; the fastest counts")
    p.add_argument('--batch', type=int, default=64, help='rows of our forward passes at most')
    p.add_argument('--generate', type=int, default=256, help='tokens of a GSM8K answer')
    p.add_argument('--profile', help='base and items of this profile, not random ones')
    p.add_argument('--leaderboard_shots', action='store_true', help="not the profile's worked examples")
    p.add_argument('--shape', choices=SHAPES, default='smollm2-135m')
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--out', help='also write benchmarks/results/NAME.md and .json')
    a = p.parse_args()
    a.load = os.getloadavg()[0]
    r = compare(a)
    print(show(r))
    if a.out:
        keep(a.out, page(r, 'SOLAR_DATA=DIR '*('SOLAR_DATA' in os.environ) + command()), r)
