"""What a base of the tiny world can do, and what each training set teaches it.

    python benchmarks/tiny_base.py [--profile tiny] [--base FOLDER] [--sft RATE ...] [--dpo RATE ...] [--seed 0] [--bare]

1. The six benchmarks of the base and of every model trained here, with H6 and its standard error over items.
2. *Own kind*: `--own` rows (300) of each set's own writer, drawn with a seed that no training uses and without any row that was trained on. For sets
   of answers the share of greedy answers (up to a blank line) that equal the row's, word for word, and for the math set of right numbers at the end. For sets of pairs the
   share whose chosen answer is the likelier one, before and after, and the share whose difference training moved the right way.
3. *What is forgotten*: the mean of the five other benchmarks (all but GSM8K after SFT; all but TruthfulQA after DPO), minus that of the model
   that training started from.
4. The loss of an answer's token on the own-kind rows of all sets that a row trains on, which is what a rate is chosen by, together with 3.

Each `--sft` rate trains SFT v1 to v4; each `--dpo` rate trains DPO v1 and v2 from SFT v3 at the last SFT rate. `--bare` stops after the base. Seconds are
processor seconds of this process, all threads together.
"""
import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

for k, v in dict(GOMP_SPINCOUNT='30000', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', PYTHONWARNINGS='ignore').items():
    os.environ.setdefault(k, v)

import torch                                                                                                   # noqa: E402
from torch.nn.utils.rnn import pad_sequence                                                                    # noqa: E402

from solar_repro.data import SETS, load_benchmark, load_rows                                                   # noqa: E402
from solar_repro.dpo import completion_logps, reference_logps, train_dpo                                       # noqa: E402
from solar_repro.eval import evaluate, h6_se                                                                   # noqa: E402
from solar_repro.lab.model import Point, encode, load_tokenizer, materialize                                   # noqa: E402
from solar_repro.lab.profile import load_profile                                                               # noqa: E402
from solar_repro.lab.recipe import SFT_ROWS, SMA, UF                                                           # noqa: E402
from solar_repro.paper import H6_TASKS                                                                         # noqa: E402
from solar_repro.sft import train_sft                                                                          # noqa: E402
from solar_repro.tiny.world import make_world, shipped_base, training_rows                                     # noqa: E402

OWN_SEED = 777                                          # of rows that no training draws


def own_rows(name: str, n: int, trained: list[dict]) -> list[dict]:
    "Rows of a set's own kind that were not trained on, all different."
    made = SETS[name].convert(*(training_rows(make_world(), f, 3*n, OWN_SEED) for f in SETS[name].files))
    seen, out = {tuple(r.values()) for r in trained}, []
    for r in made:
        if r is not None and tuple(r.values()) not in seen: seen.add(tuple(r.values())); out.append(r)
    assert len(out) >= n, f'{name}: {len(out)} rows are left, {n} are wanted'
    return out[:n]


def answers(model, tokenizer, template, rows: list[dict], n_new: int = 90) -> list[str]:
    "Greedy answers, many at a time, up to the blank line after which a base goes on with a question of its own."
    out, eos = {}, tokenizer.eos_token_id
    ids = [p for p, _ in encode(tokenizer, template, [(r['prompt'], r['completion']) for r in rows])]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), 50):
        which = order[first:first + 50]
        longest = max(len(ids[i]) for i in which)
        batch = torch.tensor([[eos]*(longest - len(ids[i])) + ids[i] for i in which])
        mask = torch.tensor([[0]*(longest - len(ids[i])) + [1]*len(ids[i]) for i in which])
        with torch.inference_mode():
            got = model.generate(batch, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=eos)
        for i, g in zip(which, got): out[i] = tokenizer.decode(g[longest:], skip_special_tokens=True).split('\n\n')[0].strip()
    return [out[i] for i in range(len(rows))]


def answer_loss(model, tokenizer, template, rows: list[dict]) -> float:
    "Mean loss of an answer's token, nats."
    total, n = 0., 0
    coded = sorted(encode(tokenizer, template, [(r['prompt'], r['completion']) for r in rows]), key=lambda pa: len(pa[0] + pa[1]))
    for i in range(0, len(coded), 32):
        ids = pad_sequence([torch.tensor(p + a) for p, a in coded[i:i + 32]], batch_first=True)
        labels = pad_sequence([torch.tensor([-100]*len(p) + a) for p, a in coded[i:i + 32]], batch_first=True, padding_value=-100)
        with torch.inference_mode(): total -= completion_logps(model(input_ids=ids).logits, labels).sum().item()
        n += (labels != -100).sum().item()
    return total/n


def last_number(text: str) -> str: return text.split('#### ')[-1].split()[0] if '#### ' in text else ''


class Bench:
    "Asks models; remembers what the models before them scored."

    def __init__(self, p, n_choice: int, n_gsm8k: int):
        self.p = p
        self.items = {t: load_benchmark(t, 'tiny', n_gsm8k if t == 'gsm8k' else n_choice) for t in H6_TASKS}
        print(f'{"":<22}' + ''.join(f'{t:>12}' for t in (*H6_TASKS, 'plain', 'H6', 'se', 'cpu s')), flush=True)

    def __call__(self, name: str, point: Point) -> dict[str, float]:
        began, model, got = time.process_time(), materialize(point), {}
        for t in H6_TASKS: got[t] = evaluate(point, t, self.items[t], getattr(self.p.eval.num_fewshot, t), self.p.eval.batch_size, model=model)[0]
        scores = {t: 100*got[t]['score'] for t in H6_TASKS}
        more = (100*got['truthfulqa']['plain'], sum(scores.values())/6, 100*h6_se({t: got[t]['se'] for t in H6_TASKS}))
        print(f'{name:<22}' + ''.join(f'{x:>12.1f}' for x in (*scores.values(), *more[:2])) + f'{more[2]:>12.2f}{time.process_time() - began:>12.0f}',
              flush=True)
        return scores


def sft_part(a, p, base: Point, bench: Bench, base_scores: dict, d: Path) -> Point:
    "SFT v1 to v4 at each rate; returns the last SFT v3."
    tok, sets = load_tokenizer(base.base), SFT_ROWS['SFT v3']
    train = {s: load_rows(s, 'tiny', getattr(p.data.rows, s), a.seed) for s in sets}
    own = {s: own_rows(s, a.own, train[s]) for s in sets}

    def kinds(name: str, point: Point) -> None:
        model, said = materialize(point), []
        for s in sets:
            got = answers(model, tok, p.template, own[s])
            said.append(f'{s} {sum(g == r["completion"] for g, r in zip(got, own[s]))/a.own:.1%}')
            if s == sets[-1]: said.append(f'its last number {sum(last_number(g) == last_number(r["completion"]) for g, r in zip(got, own[s]))/a.own:.1%}')
            said.append(f'(loss {answer_loss(model, tok, p.template, own[s]):.4f})')
        print(f'  own kind of {name}: ' + ', '.join(said).replace(', (', ' ('), flush=True)

    kinds('base', base)
    start = base
    for rate in a.sft:
        for row in a.sft_rows:
            began = time.process_time()
            rows = [r for s in SFT_ROWS[row] for r in train[s]]
            out = d/f'{row} {rate}'
            train_sft(base.base, rows, out, p.sft.model_copy(update=dict(learning_rate=rate, epochs=a.epochs)), p.template, a.seed)
            point = Point(base.base, ((out/'adapter', 1.),))
            print(f'{row} at {rate:g}, {len(rows)} rows, seed {a.seed}: {time.process_time() - began:.0f} cpu s')
            scores = bench(f'{row} {rate:g}', point)
            others = [t for t in H6_TASKS if t != 'gsm8k']
            print(f'  the five others: {sum(scores[t] - base_scores[t] for t in others)/5:+.1f}', flush=True)
            kinds(row, point)
            if row == 'SFT v3': start = point
    return start


def dpo_part(a, p, start: Point, bench: Bench, d: Path) -> None:
    "DPO v1 and v2 from SFT v3 at each rate."
    pairs = {s: load_rows(s, 'tiny', getattr(p.data.rows, s), a.seed) for s in (UF, SMA)}
    own = {s: own_rows(s, a.own, pairs[s]) for s in pairs}
    before = {s: reference_logps(start, own[s], p.dpo, p.template) for s in own}
    start_scores = bench('SFT v3', start)
    ref = {UF: reference_logps(start, pairs[UF], p.dpo, p.template)}
    for rate in a.dpo:
        point, settings = start, p.dpo.model_copy(update=dict(learning_rate=rate))
        for row, s in (('DPO v1', UF), ('DPO v2', SMA)):
            began, out = time.process_time(), d/f'{row} {rate}'
            logps = ref[UF] if s == UF else reference_logps(point, pairs[s], p.dpo, p.template)
            train_dpo(point, pairs[s], logps, out, settings, p.template, a.seed)
            point = Point(start.base, ((out/'adapter', 1.),))
            print(f'{row} at {rate:g}: {time.process_time() - began:.0f} cpu s')
            scores = bench(f'{row} {rate:g}', point)
            print(f'  the five others: {sum(scores[t] - start_scores[t] for t in H6_TASKS if t != "truthfulqa")/5:+.1f}')
            for k in own:
                after, was = reference_logps(point, own[k], p.dpo, p.template), before[k]
                margin = (after.chosen - after.rejected) - (was.chosen - was.rejected)
                loss = -torch.nn.functional.logsigmoid(p.dpo.beta*torch.tensor(margin.values)).mean()
                print(f'  own kind {k}: chosen likelier {(was.chosen > was.rejected).mean():.1%} -> {(after.chosen > after.rejected).mean():.1%}, moved '
                      f'the right way {(margin > 0).mean():.1%}, margin {margin.mean():.1f} nats, chosen {(after.chosen - was.chosen).mean():+.1f}, '
                      f'loss {loss:.4f}', flush=True)
            if row == a.last: break


def main(a) -> None:
    p = load_profile(a.profile)
    torch.set_num_threads(a.threads); torch.set_flush_denormal(True)
    base = Point(Path(a.base) if a.base else shipped_base())
    bench = Bench(p, a.choice, a.gsm8k)
    scores = bench('base', base)
    if a.bare: return
    with TemporaryDirectory() as d:
        start = sft_part(a, p, base, bench, scores, Path(a.keep or d))
        if a.dpo: dpo_part(a, p, start, bench, Path(a.keep or d))


if __name__ == '__main__':
    a = argparse.ArgumentParser(description='What a base can do and what each training set teaches it.')
    a.add_argument('--profile', default='tiny', help='name of a profile or path of a TOML file')
    a.add_argument('--base', help='folder of a base; default: the one shipped')
    a.add_argument('--sft', nargs='*', type=float, default=[1e-3], help='rates of SFT')
    a.add_argument('--dpo', nargs='*', type=float, default=[3e-4], help='rates of DPO')
    a.add_argument('--sft-rows', nargs='*', default=list(SFT_ROWS), help='rows to train; SFT v3 among them')
    a.add_argument('--epochs', type=int, default=1, help='of SFT')
    a.add_argument('--last', default='DPO v2', help='DPO row to stop at')
    a.add_argument('--seed', type=int, default=0, help='of the rows and the training')
    a.add_argument('--own', type=int, default=300, help='rows of each own kind')
    a.add_argument('--choice', type=int, default=500, help='items of each choice benchmark')
    a.add_argument('--gsm8k', type=int, default=300, help='items of GSM8K')
    a.add_argument('--threads', type=int, default=1)
    a.add_argument('--bare', action='store_true', help='the base only')
    a.add_argument('--keep', help='folder for the adapters; default: a temporary one')
    main(a.parse_args())
