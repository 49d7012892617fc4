"""Our SFT and DPO against TRL's defaults, on the same rows in one run: tokens and pairs a second, share of the matmul
rate, peak memory.

    python benchmarks/train.py --out train                                             # SmolLM2-135M's shape, CPU, as
    the profile smol trains
    python benchmarks/train.py --device cuda --shape 1b --rows 256 --pairs 128         # on a GPU, as the profile a100
    trains; also --shape 10.7b
    python benchmarks/train.py --shape smoke --rows 24 --pairs 12                      # seconds: that the script works

The model has random weights, so nothing is fetched. Rows are random words with the lengths that
`data.SETS` records of the published sets, mixed as in the paper; a row longer than the profile's
max_length is not drawn. Each side trains in a process of its own: TRL's trainers as a user calls them (`SFTTrainer`
and `DPOTrainer`, everything left at its default: rows padded to the longest of a batch, layers computed again in the
backward pass, the reference computed at every step) with the same base, NF4, adapter, learning rate, dtype,
max_length and rows a step; ours with the profile's settings and `--max_tokens_per_microbatch`. Times are those of the
trainer's loop; DPO's reference pass is timed too and counted in the first ratio (a reference that several rows share
is computed once, as DPO v2 and Cand. 1 share theirs: the second ratio leaves it out).

Peak memory is the process's resident memory at its highest during training, on a GPU what the allocator handed out.
Useful tokens are those of the rows, without padding, a pair's prompt twice. The share of the matmul rate counts what
has to be computed (a pair's prompt once, logits of answers only, nothing twice).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kept import command, keep
from shapes import LLAMA_1B, SMOLLM2_135M, SOLAR, llama, random_base

for k, v in dict(
    OMP_WAIT_POLICY='PASSIVE', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', PYTHONWARNINGS='ignore'
).items():
    os.environ.setdefault(k, v)

SHAPES = {'smoke': llama(64, 128, 2, 4, 2, 4096, True), '135m': SMOLLM2_135M, '1b': LLAMA_1B, '10.7b': SOLAR}
MIX = dict(
    sft=dict(alpaca_gpt4=52, openorca=100, synth_math_instruct=50),
    dpo=dict(ultrafeedback_clean=60.8, synth_math_alignment=20.1),
)  # the paper's Table 1, thousands
# share of a row, by the characters of samples; of pairs beside the longer answer
PROMPT = dict(
    alpaca_gpt4=0.3, openorca=0.54, synth_math_instruct=0.33, ultrafeedback_clean=0.3, synth_math_alignment=0.3
)
AIM = 2.0


def draw(kind, n, longest, scale, seed=0):
    "Lengths of rows: prompt and one answer, or prompt and two."
    import numpy as np
    from solar_repro.data import SETS

    rng, out = random.Random(seed), []
    while len(out) < n:
        (name,) = rng.choices(list(MIX[kind]), list(MIX[kind].values()))
        q = SETS[name].lengths.quantiles
        whole = int(scale * float(np.interp(rng.random(), np.linspace(0, 1, len(q)), q)))
        if not 16 <= whole <= longest - 16:
            continue
        prompt = min(max(4, int(whole * rng.betavariate(2, 2 / PROMPT[name] - 2))), whole - 4)
        # the shorter answer: half of the longer one on average (samples: .51)
        answers = [whole - prompt, *([max(2, int((whole - prompt) * rng.random()))] if kind == 'dpo' else [])]
        rng.shuffle(answers)
        out.append((prompt, *answers))
    return out


def make_rows(a, profile, base):
    from solar_repro.models.loading import load_tokenizer

    words = sorted(w for w in load_tokenizer(base).get_vocab() if w.isalpha() and w.islower())
    rng = random.Random(1)
    say = lambda n: ' '.join(rng.choices(words, k=max(1, n)))
    fields = dict(sft=('prompt', 'completion'), dpo=('prompt', 'chosen', 'rejected'))
    return {
        k: [
            dict(zip(fields[k], map(say, x)))
            for x in draw(k, n, (profile.sft if k == 'sft' else profile.dpo).max_length, a.scale)
        ]
        for k, n in (('sft', a.rows), ('dpo', a.pairs))
    }


def settings_of(a):
    "The profile that is trained with: smol's, or a100's on large shapes."
    from solar_repro.core.config import load_profile

    p = load_profile('a100' if a.shape in ('1b', '10.7b') else 'smol')
    own = dict(
        compute_dtype=a.dtype or p.sft.compute_dtype,
        max_tokens_per_microbatch=a.max_tokens_per_microbatch,
        microbatches=1,
        optimizer=p.sft.optimizer if a.device == 'cuda' else 'adamw_torch_fused',
    )
    t = p.template.model_copy(update=dict(prompt='Question: {prompt}\nAnswer:', separator=' '))
    return p.model_copy(update=dict(sft=p.sft.model_copy(update=own), dpo=p.dpo.model_copy(update=own), template=t))


class Meter:
    "Seconds and peak memory of `Trainer.train`."

    def __init__(self, device):
        import torch
        from transformers import Trainer

        self.seconds, self.mib, self.steps, train = 0.0, 0.0, 0, Trainer.train

        def timed(trainer, *args, **kwargs):
            if device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            else:
                Path('/proc/self/clear_refs').write_text('5')
            start = time.perf_counter()
            out = train(trainer, *args, **kwargs)
            if device == 'cuda':
                torch.cuda.synchronize()
            self.seconds, self.steps = time.perf_counter() - start, trainer.state.global_step
            self.mib = (
                torch.cuda.max_memory_allocated() / 2**20
                if device == 'cuda'
                else next(
                    int(l.split()[1])
                    for l in Path('/proc/self/status').read_text().splitlines()
                    if l.startswith('VmHWM')
                )
                / 1024
            )
            return out

        Trainer.train = timed


def ours(kind, a, p, base, rows, start, out):
    import solar_repro.dpo as dpo
    from solar_repro.models.adapters import AdaptedModel
    from solar_repro.sft import train_sft

    meter, ref_s = Meter(a.device), 0.0
    if kind == 'sft':
        train_sft(base, rows, out, p.sft, p.template, 0, a.device)
    else:
        point, loaded, load = AdaptedModel(base, ((start, 1.0),)), [], dpo.load_policy

        def loading(*args):
            model = load(*args)
            loaded.append(time.perf_counter())
            return model

        dpo.load_policy = loading
        ref = dpo.reference_logps(point, rows, p.dpo, p.template, a.device)
        ref_s = time.perf_counter() - loaded[0]
        dpo.train_dpo(point, rows, ref, out, p.dpo, p.template, 0, a.device)
    return meter, ref_s


def said_of(row, template):
    "A row as TRL takes it: prompt and answers laid out by our template."
    from solar_repro.models.loading import render

    prompt = render(template, row['prompt'])[0]
    return dict(prompt=prompt, **{k: render(template, '', v)[1] for k, v in row.items() if k != 'prompt'})


def common_arguments(a, x, out, step):
    "TRL's arguments of both kinds: 8 rows at once, the default of per_device_train_batch_size, or as many as a step."
    each = min(8, step)
    return dict(
        output_dir=str(out), per_device_train_batch_size=each, gradient_accumulation_steps=max(1, step // each),
        learning_rate=x.learning_rate, num_train_epochs=1, max_length=x.max_length, use_cpu=a.device == 'cpu',
        bf16=x.compute_dtype == 'bfloat16', report_to='none', disable_tqdm=True, save_strategy='no', optim=x.optimizer,
    )


def trls(kind, a, p, base, rows, start, out, step):
    "TRL as a user calls it; a step has as many rows as one of ours."
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from solar_repro.models.loading import load_base, load_tokenizer, quiet

    x = getattr(p, kind)
    common, data = common_arguments(a, x, out, step), Dataset.from_list([said_of(r, p.template) for r in rows])
    model, tok, meter = load_base(base, x.nf4, x.compute_dtype, a.device), load_tokenizer(base), Meter(a.device)
    how = dict(train_dataset=data, processing_class=tok)
    with quiet():
        if kind == 'sft':
            lora = LoraConfig(r=x.lora_r, lora_alpha=x.lora_alpha, lora_dropout=x.lora_dropout,
                              target_modules='all-linear', task_type='CAUSAL_LM')
            t = SFTTrainer(model, args=SFTConfig(**common), peft_config=lora, **how)
        else:
            policy = PeftModel.from_pretrained(model, start, is_trainable=True)
            t = DPOTrainer(policy, args=DPOConfig(**common, beta=x.beta), **how)
        t.train()
    return meter, 0.0


def matmul_rate(shape, dtype, device):
    "TFLOP/s of the largest product of a layer, the best of a few."
    import torch

    h, f = SHAPES[shape]['hidden_size'], SHAPES[shape]['intermediate_size']
    x, w, times = (
        torch.randn(2048, h, device=device, dtype=getattr(torch, dtype)),
        torch.randn(f, h, device=device, dtype=getattr(torch, dtype)),
        [],
    )
    for _ in range(20):
        start = time.perf_counter()
        x @ w.T
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 2048 * h * f / min(times) / 1e12


def side(a, base, work):
    "One process: one kind on one side."
    import torch

    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    who, kind = a.side.split()
    p, rows, made = (
        settings_of(a),
        json.loads((work / 'rows.json').read_text())[kind],
        json.loads((work / 'made.json').read_text()),
    )
    out = Path(tempfile.mkdtemp(dir=work))
    m, ref_s = (
        ours(kind, a, p, base, rows, work / 'start', out)
        if who == 'ours'
        else trls(kind, a, p, base, rows, work / 'start', out, made[kind]['step'])
    )
    print(
        json.dumps(
            dict(
                seconds=m.seconds,
                ref_s=ref_s,
                mib=m.mib,
                steps=m.steps,
                tflops=matmul_rate(a.shape, p.sft.compute_dtype, a.device),
            )
        )
    )


def prepare(a, base, work):
    "Rows, their tokens, rows a step, and an adapter for DPO to start from."
    from peft import LoraConfig, get_peft_model
    from solar_repro.dpo import dpo_rows
    from solar_repro.models.loading import load_base, load_tokenizer
    from solar_repro.sft import sft_rows

    p = settings_of(a)
    random_base(base, SHAPES[a.shape], p.sft.compute_dtype if a.shape == '10.7b' else 'float32', a.device)
    rows, tok = make_rows(a, p, base), load_tokenizer(base)
    s, d = (
        sft_rows(rows['sft'], tok, p.template, p.sft.max_length),
        dpo_rows(rows['dpo'], tok, p.template, p.dpo.max_length),
    )
    n, n_d = (
        [len(x) for x in s['input_ids']],
        [[len(r[f'{k}_ids']) for k in ('prompt', 'chosen', 'rejected')] for r in d],
    )
    packed = max(1, sum(n) / (p.sft.batch_size * p.sft.max_length))  # our steps, nearly
    made = dict(
        sft=dict(
            tokens=sum(n),
            once=sum(n),
            context=sum(x * x for x in n) / sum(n),
            scored=sum(x != -100 for l in s['labels'] for x in l),
            step=max(1, round(len(n) / packed)),
        ),
        dpo=dict(
            tokens=sum(2 * x + c + j for x, c, j in n_d),
            once=sum(map(sum, n_d)),
            context=sum((x + c) ** 2 + (x + j) ** 2 for x, c, j in n_d) / sum(2 * x + c + j for x, c, j in n_d),
            scored=sum(c + j for _, c, j in n_d),
            step=p.dpo.batch_size,
        ),
    )
    (work / 'rows.json').write_text(json.dumps(rows))
    (work / 'made.json').write_text(json.dumps(made))
    lora = LoraConfig(r=p.sft.lora_r, lora_alpha=p.sft.lora_alpha, target_modules='all-linear', task_type='CAUSAL_LM')
    get_peft_model(load_base(base, p.sft.nf4, p.sft.compute_dtype, a.device), lora).save_pretrained(work / 'start')


def flops(base, m, rank):
    "What has to be computed for the rows: forward, gradients of activations and of the adapter; nothing twice."
    from solar_repro.planning.cost_model import forward_flops, shape_of

    s = shape_of(base)
    body = forward_flops(s, m['context'], rank, 0.0)
    # with gradients; without
    return m['once'] * (2 * body + 2 * s.lora(rank)) + m['scored'] * 4 * s.hidden * s.vocab, m['once'] * body + m[
        'scored'
    ] * 2 * s.hidden * s.vocab


def compare(a):
    out = []
    with tempfile.TemporaryDirectory() as d:
        work = Path(d)
        base = work / 'base'
        again = lambda what: subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], '--side', what, '--work', d], capture_output=True, text=True
        )
        r = again('prepare')
        if r.returncode:
            sys.exit(r.stderr[-3000:])
        made, p = json.loads((work / 'made.json').read_text()), settings_of(a)
        for kind in ('sft', 'dpo'):
            line = dict(kind=kind, rows=a.rows if kind == 'sft' else a.pairs, **made[kind])
            step, ref = flops(base, made[kind], p.sft.lora_r)
            for who in ('trl', 'ours'):
                r = again(f'{who} {kind}')
                if r.returncode:
                    sys.exit(f'{who} {kind}: ' + r.stderr[-3000:])
                x = json.loads(r.stdout.splitlines()[-1])
                all_s = x['seconds'] + x['ref_s']
                line[who] = dict(
                    x,
                    tokens_s=made[kind]['tokens'] / all_s,
                    rows_s=line['rows'] / all_s,
                    share=(step + ref * (kind == 'dpo')) / all_s / 1e12 / x['tflops'],
                )
            t, o = line['trl'], line['ours']
            line.update(
                ratio=t['seconds'] / (o['seconds'] + o['ref_s']),
                ratio_ref_known=t['seconds'] / o['seconds'],
                memory_ratio=t['mib'] / o['mib'],
            )
            out.append(line)
    import torch

    where = torch.cuda.get_device_name() if a.device == 'cuda' else f'{platform.machine()}, {os.cpu_count()} CPU cores'
    return dict(
        machine=where,
        load_before=round(a.load, 1),
        shape=a.shape,
        dtype=p.sft.compute_dtype,
        scale=a.scale,
        max_tokens_per_microbatch=a.max_tokens_per_microbatch,
        torch=torch.__version__,
        kinds=out,
    )


def show(r):
    head = (
        f'{"":<10}{"rows":>6}{"tokens":>8}{"a step":>8}{"steps":>7}{"train s":>9}{"ref s":>8}'
        f'{"tok/s":>9}{"rows/s":>8}{"of matmul":>11}{"peak MiB":>10}'
    )
    lines = [
        f"{r['shape']}, random weights, {r['dtype']}, NF4"
        f"; {r['machine']}, load {r['load_before']} before; torch {r['torch']}",
        head,
        '-' * len(head),
    ]
    for k in r['kinds']:
        for who, name in (('trl', 'TRL'), ('ours', 'ours')):
            x = k[who]
            lines.append(
                f"{name + ' ' + k['kind'].upper():<10}{k['rows']:>6}{k['tokens']:>8}"
                f"{k['step'] if who == 'trl' else '':>8}{x['steps']:>7}"
                f"{x['seconds']:>9.1f}{x['ref_s']:>8.1f}{x['tokens_s']:>9.0f}{x['rows_s']:>8.2f}"
                f"{x['share']:>11.0%}{x['mib']:>10.0f}"
            )
        known = f", {k['ratio_ref_known']:.2f} with the reference known" if k['kind'] == 'dpo' else ''
        lines.append(
            f"{'':<10}{k['kind'].upper()}: {k['ratio']:.2f} times as fast{known}"
            f"; peak memory {1 / k['memory_ratio']:.2f} of TRL's"
        )
    return '\n'.join(lines)


def page(r, repeat):
    worst = min(k['ratio'] for k in r['kinds'])
    return (
        f"# Training: ours against TRL's defaults\n\n"
        f"The same rows, lengths drawn from those of the published sets (up to max_length), on {r['machine']}"
        f"; every side in a process of its own. "
        f"Our steps go in passes of at most {r['max_tokens_per_microbatch']} tokens.\n\n"
        f"**The aim of {AIM:g} times for SFT and for DPO is {'' if worst >= AIM else 'not '}reached**: "
        + ' and '.join(f"{k['kind'].upper()} {k['ratio']:.2f} times" for k in r['kinds'])
        + f", DPO's reference pass counted.\n\n"
        f"Repeat: `{repeat}` (the script overwrites this page).\n\n```\n{show(r)}\n```\n"
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(description="Our SFT and DPO against TRL's defaults.")
    p.add_argument('--shape', choices=SHAPES, default='135m')
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), help="the profile's if not given")
    p.add_argument('--rows', type=int, default=40, help='of SFT')
    p.add_argument('--pairs', type=int, default=16)
    p.add_argument('--scale', type=float, default=1.0, help='of the lengths')
    p.add_argument('--max_tokens_per_microbatch', type=int, default=2048)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--out', help='also write benchmarks/results/NAME.md and .json')
    p.add_argument('--side', help=argparse.SUPPRESS)
    p.add_argument('--work', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side == 'prepare':
        prepare(a, a.work / 'base', a.work)
    elif a.side:
        side(a, a.work / 'base', a.work)
    else:
        a.load = os.getloadavg()[0]
        r = compare(a)
        print(show(r))
        if a.out:
            keep(a.out, page(r, command()), r)
