"""How the tiny profile's learning rates were chosen: by what training teaches of its own rows, unseen ones, and by what
it makes a model forget; never by the order of a table's rows.

    python benchmarks/learning_rates.py [--profile tiny] [--base FOLDER] [--sft RATE ...] [--dpo RATE ...] [--seed 100]

The paper gives no learning rate. A line a model:

1. *Own kind*: `--own` rows of each set that training has not seen. For sets of answers, the share of greedy answers (up
   to a blank line) that equal the row's, word for word, and the mean loss of an answer's token. For sets of pairs, the
   share whose chosen answer is the likelier, and the DPO loss.
2. *The six benchmarks*, H6 and its standard error over items. What is forgotten is the mean of the others (all but
   GSM8K after SFT, all but TruthfulQA after DPO) less that of the model that training started from.

Each `--sft` rate trains the rows of `--sft-rows`; each `--dpo` rate trains DPO v1 and v2 from SFT v3 at the last SFT
rate. Rows are drawn with `--seed`; the tables draw theirs with other seeds. Seconds are processor seconds.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

for k, v in dict(GOMP_SPINCOUNT='30000', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
                 PYTHONWARNINGS='ignore').items(): os.environ.setdefault(k, v)

import torch                                                                    # noqa: E402
from torch.nn.utils.rnn import pad_sequence                                     # noqa: E402

from solar_repro.core.config import load_profile                                # noqa: E402
from solar_repro.dpo import completion_logps, reference_logps, train_dpo        # noqa: E402
from solar_repro.eval import answer_rows, evaluate                              # noqa: E402
from solar_repro.models.adapters import AdaptedModel, materialize               # noqa: E402
from solar_repro.models.loading import encode, load_tokenizer                   # noqa: E402
from solar_repro.paper import h6_se, H6_TASKS                                   # noqa: E402
from solar_repro.stages.graph import SFT_ROWS                                 # noqa: E402
from solar_repro.stages.sources import source_of                              # noqa: E402
from solar_repro.sft import train_sft                                           # noqa: E402
from solar_repro.tiny.world import shipped_base                                 # noqa: E402

PAIRS = 'ultrafeedback_clean', 'synth_math_alignment'


def split(p, name: str, n_own: int, seed: int) -> tuple[list[dict], list[dict]]:
    "As many rows as the profile trains on, and rows of their kind that equal none of them, as the tables hold out."
    source = source_of(p.data.source)
    rows = source.rows(name, p.data.rows[name], seed).rows
    return rows, source.rows(name, n_own, seed, trained=rows).rows


def answer_loss(model, tokenizer, template, rows: list[dict]) -> float:
    "Mean loss of an answer's token, nats, over all answers."
    total, n = 0., 0
    coded = encode(tokenizer, template, [(r['prompt'], r['completion']) for r in rows])
    coded.sort(key=lambda pa: len(pa[0] + pa[1]))
    for i in range(0, len(coded), 32):
        ids = pad_sequence([torch.tensor(p + a) for p, a in coded[i:i + 32]], batch_first=True)
        labels = pad_sequence([torch.tensor([-100]*len(p) + a) for p, a in coded[i:i + 32]], batch_first=True,
                              padding_value=-100)
        with torch.inference_mode(): total -= completion_logps(model(input_ids=ids).logits, labels).sum().item()
        n += (labels != -100).sum().item()
    return total/n


class Bench:
    "Asks models; a line each."

    def __init__(self, p, n_choice: int, n_gsm8k: int):
        self.p, source = p, source_of(p.data.source)
        self.items = {t: source.items(t, n_gsm8k if t == 'gsm8k' else n_choice)[0] for t in H6_TASKS}
        print(f'{"":<22}' + ''.join(f'{t:>11}' for t in (*H6_TASKS, 'H6', 'se', 'cpu s')), flush=True)

    def __call__(self, name: str, point: AdaptedModel) -> dict[str, float]:
        began, model, how = time.process_time(), materialize(point), self.p.eval
        got = {t: evaluate(model, point.base, t, self.items[t], how.num_fewshot[t], how.batch_size)[0]
               for t in H6_TASKS}
        scores = {t: 100*x['score'] for t, x in got.items()}
        h6, se = sum(scores.values())/6, 100*h6_se({t: x['se'] for t, x in got.items()})
        spent = time.process_time() - began
        print(f'{name:<22}' + ''.join(f'{x:>11.1f}' for x in (*scores.values(), h6)) + f'{se:>11.2f}{spent:>11.0f}',
              flush=True)
        return scores


def forgotten(after: dict, before: dict, taught: str) -> str:
    others = [t for t in H6_TASKS if t != taught]
    return f'  the five others: {sum(after[t] - before[t] for t in others)/5:+.1f}'


def sft_part(a, p, base: AdaptedModel, bench: Bench, before: dict, d: Path) -> AdaptedModel:
    "Rows of SFT at each rate; returns the last SFT v3."
    tok, sets = load_tokenizer(base.base), SFT_ROWS['SFT v3']
    train, own = zip(*(split(p, s, a.own, a.seed) for s in sets))
    train, own = dict(zip(sets, train)), dict(zip(sets, own))

    def kinds(name: str, point: AdaptedModel) -> None:
        model, said = materialize(point), []
        for s in sets:
            exact = sum(x['score'] for x in answer_rows(model, base.base, own[s], p.template, p.eval.batch_size))/a.own
            said.append(f'{s} {exact:.1%} (loss {answer_loss(model, tok, p.template, own[s]):.4f})')
        print(f'  own kind of {name}: ' + ', '.join(said), flush=True)

    kinds('base', base)
    start = base
    for rate in a.sft:
        for row in a.sft_rows:
            began, out = time.process_time(), d/f'{row} {rate}'
            rows = [r for s in SFT_ROWS[row] for r in train[s]]
            settings = p.sft.model_copy(update=dict(learning_rate=rate, epochs=a.epochs))
            train_sft(base.base, rows, out, settings, p.template, a.seed)
            point = AdaptedModel(base.base, ((out/'adapter', 1.),))
            print(f'{row} at {rate:g}, {len(rows)} rows: {time.process_time() - began:.0f} cpu s')
            print(forgotten(bench(f'{row} {rate:g}', point), before, 'gsm8k'), flush=True)
            kinds(row, point)
            if row == 'SFT v3': start = point
    return start


def dpo_part(a, p, start: AdaptedModel, bench: Bench, d: Path) -> None:
    "DPO v1, and v2 after it, from SFT v3 at each rate."
    train, own = zip(*(split(p, s, a.own, a.seed) for s in PAIRS))
    before = {s: reference_logps(start, rows, p.dpo, p.template) for s, rows in zip(PAIRS, own)}
    start_scores = bench('SFT v3', start)
    for rate in a.dpo:
        point, settings = start, p.dpo.model_copy(update=dict(learning_rate=rate))
        for row, pairs in zip(('DPO v1', 'DPO v2')[:1 + a.both], train):
            began, out = time.process_time(), d/f'{row} {rate}'
            train_dpo(point, pairs, reference_logps(point, pairs, p.dpo, p.template), out, settings, p.template, a.seed)
            point = AdaptedModel(start.base, ((out/'adapter', 1.),))
            print(f'{row} at {rate:g}, {len(pairs)} pairs: {time.process_time() - began:.0f} cpu s')
            print(forgotten(bench(f'{row} {rate:g}', point), start_scores, 'truthfulqa'))
            for s, rows in zip(PAIRS, own): print(order(point, rows, before[s], s, p), flush=True)


def order(point: AdaptedModel, rows: list[dict], was, name: str, p) -> str:
    "How often the chosen answer is the likelier, before and after, and how far answers moved."
    now = reference_logps(point, rows, p.dpo, p.template)
    margin = torch.tensor(((now.chosen - now.rejected) - (was.chosen - was.rejected)).values)
    loss = -torch.nn.functional.logsigmoid(p.dpo.beta*margin).mean()
    before, after = ((x.chosen > x.rejected).mean() for x in (was, now))
    return (f'  own kind {name}: chosen likelier {before:.1%} -> {after:.1%}, margin {margin.mean():.1f} nats, '
            f'chosen {(now.chosen - was.chosen).mean():+.1f}, loss {loss:.4f}')


def main(a) -> None:
    p = load_profile(a.profile)
    torch.set_num_threads(p.machine.threads); torch.set_flush_denormal(True)
    base = AdaptedModel(Path(a.base) if a.base else shipped_base())
    bench = Bench(p, a.choice, a.gsm8k)
    scores = bench('base', base)
    with TemporaryDirectory() as d:
        d = Path(a.keep or d)
        start = sft_part(a, p, base, bench, scores, d) if a.sft else base
        if a.start: start = AdaptedModel(base.base, ((Path(a.start), 1.),))
        if a.dpo: dpo_part(a, p, start, bench, d)


if __name__ == '__main__':
    a = argparse.ArgumentParser(description='What rates teach of a set, and what they make a model forget.')
    a.add_argument('--profile', default='tiny', help='name of a profile or path of a TOML file')
    a.add_argument('--base', help='folder of a base; default: the one shipped')
    a.add_argument('--sft', nargs='*', type=float, default=[6e-4, 1.2e-3, 2.4e-3, 4.8e-3], help='rates of SFT')
    a.add_argument('--dpo', nargs='*', type=float, default=[1e-4, 3e-4, 6e-4, 1.2e-3], help='rates of DPO')
    a.add_argument('--sft-rows', nargs='*', default=['SFT v3'], help='rows to train; SFT v3 last')
    a.add_argument('--epochs', type=int, default=1, help='of SFT')
    a.add_argument('--both', action='store_true', help='DPO v2 after DPO v1')
    a.add_argument('--start', help='folder of an adapter that DPO starts from instead of SFT v3')
    a.add_argument('--seed', type=int, default=100, help='of the rows and the training')
    a.add_argument('--own', type=int, default=300, help='rows of each own kind')
    a.add_argument('--choice', type=int, default=300, help='items of each choice benchmark')
    a.add_argument('--gsm8k', type=int, default=150, help='items of GSM8K')
    a.add_argument('--keep', help='folder for the adapters; default: a temporary one')
    main(a.parse_args())
