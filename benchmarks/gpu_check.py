"""Minutes on a card: what has only ever run on a CPU runs on the card, and its rates are measured.

    python benchmarks/gpu_check.py --minutes 8 [--wheels FOLDER] [--out benchmarks/results/gpu_check.json]

Steps in this order, each in a process of its own and for as long as time is left; the JSON is written after every
part of them. What fails, dies or is cut off is written down with what it had found, and the next goes on:
  four_bits  NF4 there and back, and a step of the paged optimizer
  recipe     a random fp16 base in shards: SFT, killed and resumed, reference, DPO, averages, SLERP, benchmarks
  sft, dpo   a random base of SOLAR-10.7B's shape made on the card, in NF4: seconds and bytes of quantizing it; tokens a
             second, share of the peak, bytes; attention in runs beside attention under a mask, in speed and gradient;
             SFT with and without dropout, fused norms and autocast, and once profiled; how far log-probabilities move
             when pairs are grouped otherwise
  scoring    benchmarks/h6.py on HellaSwag, MMLU, GSM8K in bfloat16
  merging    merges on the card and on the CPU: the same bits?
On a machine without a card everything runs at toy size. --wheels is a folder of wheels: those that the machine lacks,
or has in another version, are installed without an index. `--strip 130` first leaves only that CUDA version's library
in the wheel of bitsandbytes there, and fails if wheels and repository are more than can be carried.
"""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = str(HERE), str(HERE.parent)
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

from shapes import llama, SOLAR                            # noqa: E402


def stripped(wheels: Path, cuda: str):
    "Leave, of the libraries of bitsandbytes, that of the CPU and of one CUDA version."
    import zipfile
    for wheel in wheels.glob('bitsandbytes-*.whl'):
        less = wheel.with_suffix('.less')
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(less, 'w', zipfile.ZIP_DEFLATED) as new:
            gone = {n for n in old.namelist() if 'libbitsandbytes_' in n and not n.endswith(('_cpu.so', f'{cuda}.so'))}
            for n in old.namelist():
                text = old.read(n)
                if n.endswith('/RECORD'):
                    text = b''.join(l for l in text.splitlines(True) if l.split(b',')[0].decode() not in gone)
                if n not in gone: new.writestr(old.getinfo(n), text)
        less.replace(wheel)


CARRIED = 64*2**20                                         # bytes, as files lie on the disk: only wheels are packed


def check_size(wheels: Path):
    "Say what wheels and repository take, and fail where that is too much to be carried."
    said = subprocess.run(['git', 'ls-files', '-z'], cwd=HERE.parent, capture_output=True, text=True, check=True).stdout
    tracked = [f for n in said.split('\0') if n and (f := HERE.parent/n).is_file()]
    parts = [sum(f.stat().st_size for f in files) for files in (wheels.glob('*.whl'), tracked)]
    print('wheels {:.1f} MiB, tracked files {:.1f} MiB as they lie on the disk'.format(*(n/2**20 for n in parts)))
    if sum(parts) > CARRIED:
        sys.exit(f'gpu_check: {sum(parts)/2**20:.1f} MiB in all; expected at most {CARRIED >> 20}. Take out '
                 f'of {wheels} what the machine has.')


def install(wheels: Path) -> list[str]:
    "Install the wheels of a folder that are not there in this very version."
    from importlib.metadata import PackageNotFoundError, version
    def lacks(wheel):
        name, v = wheel.name.split('-')[:2]
        try: return version(name) != v
        except PackageNotFoundError: return True
    missing = [w for w in sorted(wheels.glob('*.whl')) if lacks(w)]
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', *map(str, missing)]
    if missing: subprocess.run(command, check=True)
    return [w.name for w in missing]


def bits_of(folder: Path) -> dict:
    from safetensors.torch import load_file
    return {k: v for f in sorted(folder.glob('*.safetensors')) for k, v in load_file(f).items()}


def synchronize(device: str):
    import torch
    if device == 'cuda': torch.cuda.synchronize()


def four_bits(device: str, folder: Path) -> Iterator[dict]:
    "NF4 there and back; AdamW whose state may leave the card."
    import bitsandbytes as bnb
    import torch
    x = torch.randn(1024, 1024, device=device)
    packed, state = bnb.functional.quantize_4bit(x, quant_type='nf4', compress_statistics=True)
    far = (bnb.functional.dequantize_4bit(packed, state) - x).norm()/x.norm()
    yield dict(nf4_error=far.item())
    w = torch.nn.Parameter(torch.ones(512, 512, device=device))   # of fewer than 1e5 elements nothing is paged
    optimizer = bnb.optim.PagedAdamW32bit([w], lr=.1)
    w.grad = torch.ones_like(w)
    optimizer.step()
    synchronize(device)
    yield dict(after_a_step=w.detach().mean().item())


PROFILE = """
extends = "a100"
name = "check"
label = "check of a card, random weights"
[machine]
device = "{device}"
threads = 2
[base]
source = "./base"
[data]
source = "tiny"
[data.rows]
alpaca_gpt4 = 96
openorca = 16
synth_math_instruct = 24
ultrafeedback_clean = 12
synth_math_alignment = 12
[sft]
lora_r = 8
batch_size = 4
max_length = 256
max_tokens_per_microbatch = 256
save_steps = 1
[dpo]
batch_size = 4
max_length = 256
max_tokens_per_microbatch = 512
save_steps = 1
[eval]
n_items = 6
[eval.num_fewshot]
arc = 4
hellaswag = 0
mmlu = 5
truthfulqa = 0
winogrande = 0
gsm8k = 2
"""


def fp16_base(out: Path):
    "A random base in float16, in shards."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from solar_repro.tiny.world import shipped_base
    tokenizer = AutoTokenizer.from_pretrained(shipped_base(), local_files_only=True)
    torch.manual_seed(0)
    config = LlamaConfig(**llama(128, 256, 3, 8, 2, len(tokenizer), False), max_position_embeddings=4096,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         initializer_range=.05)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(out, max_shard_size='600KB')
    tokenizer.save_pretrained(out)


def train_toy(exp, out: Path, device: str, on_progress=None):
    from solar_repro.sft import train_sft
    p = exp.profile
    train_sft(exp.build('base').path, exp.rows('data/alpaca_gpt4'), out, p.sft, p.template, 0, device, on_progress)


def toy_of(folder: Path):
    from solar_repro.pipeline.experiment import Experiment
    return Experiment(folder/'check.toml', store=folder/'store')


def killed(folder: Path, device: str):
    "Train, and kill this process at the second step, when the first has a checkpoint."
    def kill(done, total):
        if done == 2: os.kill(os.getpid(), signal.SIGKILL)
    train_toy(toy_of(folder), folder/'killed', device, kill)


def resumed(exp, folder: Path, device: str) -> dict:
    "SFT in a process that is killed after two steps, and gone on with here; the same without a kill."
    import torch
    exp.build('data/alpaca_gpt4')
    exp.build('base')                                      # for the other process, too
    said = subprocess.run([sys.executable, __file__, '--killed', str(folder), device], capture_output=True, text=True)
    if said.returncode != -signal.SIGKILL: raise RuntimeError(f'not killed: {said.returncode}, {said.stderr[-800:]}')
    found = sorted(x.name for x in (folder/'killed'/'scratch').glob('checkpoint-*'))
    for name in ('killed', 'whole'): train_toy(exp, folder/name, device)
    a, b = (bits_of(folder/n/'adapter') for n in ('killed', 'whole'))
    return dict(killed_by=-said.returncode, checkpoints=found, same_bits=all(torch.equal(a[k], b[k]) for k in b))


def recipe(device: str, folder: Path) -> Iterator[dict]:
    "The recipe on a toy, from the base to SLERP and its six scores."
    from solar_repro.paper import H6_TASKS
    (folder/'check.toml').write_text(PROFILE.format(device=device))
    fp16_base(folder/'base')
    exp = toy_of(folder)
    yield dict(resume=resumed(exp, folder, device))
    exp.run(['Merge v1', 'Merge v4'])
    yield dict(losses={n: exp.log(n)['loss'].round(4).tolist() for n in ('SFT v3', 'Cand. 1')})
    scores = {}
    for t in H6_TASKS:
        exp.run([f'eval/Merge v4/{t}'])
        scores[t] = json.loads((exp.find(f'eval/Merge v4/{t}').path/'score.json').read_text())['score']
        yield dict(scores=scores)


def quantized(layer, device: str):
    "A linear layer of random weights in NF4, made where it will be."
    import bitsandbytes as bnb
    import torch
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                            compress_statistics=True, quant_type='nf4', device='meta')
    w = torch.randn(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=device)*.02
    new.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type='nf4', compress_statistics=True, module=new)
    return new.to(device)


def random_base(device: str):
    "SOLAR's shape (a toy's without a card), made and quantized layer by layer where it will be."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = SOLAR if device == 'cuda' else llama(64, 128, 2, 4, 2, 1000, False)
    config = LlamaConfig(**shape, max_position_embeddings=4096)
    config._attn_implementation = 'sdpa'
    with torch.device('meta'): model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, m in list(model.named_modules()):
        if type(m) is not torch.nn.Linear or name == 'lm_head': continue
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, quantized(m, device))
    for m in model.modules():                              # what is not in four bits
        for k, w in list(m._parameters.items()):
            if w is None or not w.is_meta: continue
            value = torch.ones(w.shape, dtype=w.dtype, device=device)
            if w.dim() > 1: value.normal_(std=.02)
            m._parameters[k] = torch.nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True
    return model


def adapted(model, rank: int, dropout: float):
    "A model in NF4 with a float32 adapter, as a training has it."
    from peft import LoraConfig, get_peft_model
    from solar_repro.models.loading import lighten
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules='all-linear', task_type='CAUSAL_LM')
    lighten(model)                                         # as `load_base` does on a card
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for w in model.parameters():
        if w.requires_grad: w.data = w.data.float()
    return model.train()


def trainer_of(cls, device: str):
    "A trainer with what a step asks of it and no more."
    from accelerate import Accelerator
    t = cls.__new__(cls)
    t.accelerator, t.beta = Accelerator(mixed_precision='bf16', cpu=device == 'cpu'), .1
    t._metrics, t._prepare_inputs = dict(train=defaultdict(list)), lambda x: x
    return t


def timed(step, n_tok: int, device: str, flops: float, peak: float, n: int = 4) -> dict:
    "Tokens a second, share of the card's peak, and most bytes, of a step done a few times; the first one warms up."
    import torch
    step()
    synchronize(device)
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(n): step()
    synchronize(device)
    rate = n*n_tok/(time.perf_counter() - start)
    gib = torch.cuda.max_memory_allocated()/2**30 if device == 'cuda' else None
    return dict(tok_s=round(rate), share_of_peak=round(rate*flops/peak, 4), peak_gib=gib)


def peak_flops(device: str) -> float:
    "Dense bfloat16 peak of the card, by its data sheet; where it is not known, the A100's."
    import torch
    known = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L40S': 362e12, 'A6000': 155e12, '4090': 165e12}
    name = torch.cuda.get_device_name() if device == 'cuda' else ''
    return next((v for k, v in known.items() if k in name), 312e12)


def profiled(step) -> list:
    "The ten operations that take most of a step's time."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen: step()
    def spent(e): return getattr(e, 'self_device_time_total', 0) or e.self_cpu_time_total
    return [[e.key[:60], round(spent(e)/1e3, 2)] for e in sorted(seen.key_averages(), key=spent, reverse=True)[:10]]


@contextmanager
def masked():
    "Attention under a mask, on a card that could compute it in runs."
    from solar_repro.models import training
    able, training.can_run = training.can_run, lambda base: False
    try: yield
    finally: training.can_run = able


@contextmanager
def no_dropout(model):
    "Adapters that get all of their input."
    rates = {m: m.p for m in model.modules() if type(m).__name__ == 'Dropout'}
    for m in rates: m.p = 0.
    try: yield
    finally:
        for m, p in rates.items(): m.p = p


@contextmanager
def plain_norms(model):
    "Norms as transformers computes them."
    fused = {m: type(m) for m in model.modules() if type(m).__name__.endswith('RMSNorm')}
    for m, kind in fused.items(): m.__class__ = kind.__base__
    try: yield
    finally:
        for m, kind in fused.items(): m.__class__ = kind


def runs_beside_mask(model, work) -> dict:
    "Gradients of a step with attention in runs and under the mask, of a model without dropout: how far apart."
    import torch
    from solar_repro.models.training import can_run
    def gradient():
        for w in model.parameters(): w.grad = None
        work()
        return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    here = gradient()
    with masked(): there = gradient()
    apart = ((here - there).norm()/there.norm()).item()
    if not apart < .1: raise RuntimeError(f'attention in runs: the gradient is {apart:.3g} of its length off')
    return dict(can_run=can_run(model.get_base_model()), gradient_apart=apart, norm=there.norm().item())


def flops_of(model, n_row: int, rank: int) -> float:
    from solar_repro.planning.cost_model import Shape, train_flops
    c = model.get_base_model().config
    kv = c.hidden_size//c.num_attention_heads*c.num_key_value_heads
    shape = Shape(c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, kv, c.vocab_size,
                  False)
    return train_flops(shape, n_row, rank, False)


def sft(device: str, folder: Path) -> Iterator[dict]:
    "A microbatch of packed rows as `a100` has it."
    import torch
    from accelerate.utils import send_to_device
    from solar_repro import sft as ours
    from solar_repro.models.training import can_run
    n, rank = (2048, 64) if device == 'cuda' else (256, 8)
    synchronize(device)
    start = time.perf_counter()
    base = random_base(device)
    synchronize(device)
    gib = torch.cuda.memory_allocated()/2**30 if device == 'cuda' else None
    yield dict(nf4_load=dict(seconds=round(time.perf_counter() - start, 3), gib=gib))
    model = adapted(base, rank, .05)
    ids, part = torch.randint(10, base.config.vocab_size, (n,)).tolist(), n//4
    batch = ours.sft_microbatch([dict(input_ids=ids, labels=ids, seq_lengths=[part]*4)])
    batch = send_to_device(batch, device)
    trainer, step = trainer_of(ours.PackedTrainer, device), dict(microbatches=[batch], n=batch['n'])
    work = lambda: trainer.training_step(model, step)
    peak = peak_flops(device)
    flops, whole = flops_of(model, part, rank), flops_of(model, 2*n, rank)     # of runs; under a mask
    if not can_run(model.get_base_model()): flops = whole
    usual = timed(work, n, device, flops, peak)
    yield dict(autocast=usual)
    with no_dropout(model): without = timed(work, n, device, flops, peak)
    yield dict(no_dropout=dict(without, times_as_fast=round(without['tok_s']/usual['tok_s'], 3)))
    with masked(): under_mask = timed(work, n, device, whole, peak)
    yield dict(masked=under_mask)
    with plain_norms(model): yield dict(plain_norms=timed(work, n, device, flops, peak))
    yield dict(profile_ms=profiled(work))
    trainer.accelerator.autocast = lambda *a, **k: nullcontext()
    try: yield dict(no_autocast=timed(work, n, device, flops, peak, 2))
    except RuntimeError as e: yield dict(no_autocast=f'{type(e).__name__}: {str(e)[:200]}')


def dpo(device: str, folder: Path) -> Iterator[dict]:
    "A microbatch of pairs as `a100` has it; log-probabilities of pairs alone and together."
    import torch
    from accelerate.utils import send_to_device
    from solar_repro import dpo as ours
    from solar_repro.models.training import can_run
    n, rank = (4096, 64) if device == 'cuda' else (256, 8)
    model, part = adapted(random_base(device), rank, 0.), n//16
    pick = lambda k: torch.randint(10, model.config.vocab_size, (k,)).tolist()
    rows = [dict(prompt_ids=pick(part), chosen_ids=pick(part), rejected_ids=pick(part*2), ref_chosen_logps=0.,
                 ref_rejected_logps=0.) for _ in range(4)]
    batch = send_to_device(ours.shared_prefix_microbatch(rows), device)
    trainer = trainer_of(ours.SharedPrefixTrainer, device)
    work = lambda: trainer.training_step(model, dict(microbatches=[batch], n=batch['n']))
    size, peak = batch['inputs']['input_ids'].numel(), peak_flops(device)
    flops, whole = flops_of(model, 3*part, rank), flops_of(model, 2*n//4, rank) # of runs; under a mask
    if not can_run(model.get_base_model()): flops = whole
    yield timed(work, size, device, flops, peak)
    yield dict(runs_beside_mask=runs_beside_mask(model, work))
    with masked(): under_mask = timed(work, size, device, whole, peak)
    yield dict(masked=under_mask)
    model.eval()
    with torch.no_grad():
        together = ours.pair_logps(model, batch, 'bfloat16')
        alone = torch.cat([ours.pair_logps(model, ours.shared_prefix_microbatch([r]), 'bfloat16') for r in rows])
    yield dict(noise_nats=(together - alone).abs().max().item())


def scoring(device: str, folder: Path) -> Iterator[dict]:
    "Our scoring against lm-eval's own on the card."
    toy = ['--shape', 'smoke', '--items', '2', '--mmlu_items', '2']
    shape = ['--shape', 'solar-10.7b', '--dtype', 'bfloat16'] if device == 'cuda' else toy
    command = [sys.executable, HERE/'h6.py', '--tasks', 'hellaswag', 'mmlu', 'gsm8k', '--device', device, *shape]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if said.returncode: raise RuntimeError(said.stderr[-1500:])
    yield dict(said=said.stdout.splitlines()[-12:])


def merging(device: str, folder: Path) -> Iterator[dict]:
    "Which merges have the same bits on the card as on the CPU."
    import torch
    from solar_repro.merging.config import merge_config
    from solar_repro.merging.engine import merge
    from solar_repro.tiny.base import random_base
    base, a, b = (random_base(folder/f'model{i}', i) for i in range(3))
    methods = dict(linear=dict(weights=[.4, .6]), slerp=dict(t=.5), ties=dict(base=base, density=.5),
                   dare_ties=dict(base=base, density=.5))
    same = {}
    for method, x in methods.items():
        for d in (device, 'cpu'):
            to = folder/f'{method}-{d}'
            if not to.exists(): merge(merge_config(method, [a, b], **x), to, device=d, threads=2)
        one, two = (bits_of(folder/f'{method}-{d}') for d in (device, 'cpu'))
        same[method] = all(torch.equal(one[k], two[k]) for k in two)
        yield same


STEPS = {s.__name__: s for s in (four_bits, recipe, sft, dpo, scoring, merging)}


def run(name: str, device: str, out: Path):
    "A step in this process: what it has found so far is in a file, whatever happens next."
    found = dict(ok=None)
    def write(**more):
        found.update(more)
        out.write_text(json.dumps(found))
    with tempfile.TemporaryDirectory() as d:
        try:
            for part in STEPS[name](device, Path(d)): write(**part)
            write(ok=True)
        except Exception as e:
            write(ok=False, error=f'{type(e).__name__}: {e}'[:800], at=traceback.format_exc(limit=-3))


def apart(name: str, device: str, seconds: float) -> dict:
    "A step in a process of its own, cut off when its time is over."
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        out, errors = Path(d)/'found.json', Path(d)/'stderr'
        with errors.open('w') as e:
            p = subprocess.Popen([sys.executable, __file__, '--step', name, device, str(out)], stdout=e, stderr=e,
                                 start_new_session=True)
        try: ended = f'the process ended with {p.wait(seconds)}'
        except subprocess.TimeoutExpired:
            ended = 'no time left'
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()
        found = json.loads(out.read_text()) if out.exists() else dict(ok=None)
        if found['ok'] is None: found.update(ok=False, error=ended, said=errors.read_text()[-800:])
    return dict(found, seconds=round(time.time() - start, 1))


def card() -> tuple[str, dict]: # device; what this machine is
    import torch
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else 'none: toy size on a CPU'
    return device, dict(card=name, torch=torch.__version__, python=platform.python_version())


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--minutes', type=float, default=8.)
    a.add_argument('--wheels', type=Path)
    a.add_argument('--strip', metavar='CUDA')
    a.add_argument('--out', type=Path, default=HERE/'results'/'gpu_check.json')
    a.add_argument('--steps', nargs='+', choices=list(STEPS), default=list(STEPS))
    a.add_argument('--step', nargs=3, help=argparse.SUPPRESS)
    a.add_argument('--killed', nargs=2, help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.step: return run(*a.step[:2], Path(a.step[2]))
    if a.killed: return killed(Path(a.killed[0]), a.killed[1])
    if a.strip:
        stripped(a.wheels, a.strip)
        return check_size(a.wheels)
    end = time.time() + 60*a.minutes
    installed = install(a.wheels) if a.wheels else []
    device, about = card()
    out = about | dict(minutes=a.minutes, installed=installed, steps={})
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for name in STEPS:
        if name not in a.steps: continue
        left = end - time.time()
        out['steps'][name] = apart(name, device, left) if left > 0 else dict(ok=None, error='no time left')
        a.out.write_text(json.dumps(out, indent=1) + '\n')
        print(name, json.dumps(out['steps'][name])[:300], flush=True)
    sys.exit(any(x['ok'] is False for x in out['steps'].values()))


if __name__ == '__main__': main()
