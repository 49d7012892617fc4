"""Training, evaluation, merges and their geometry on the fake card; prints JSON.

Run: python tests/on_fake_card.py WHAT FOLDER. FOLDER holds base/, a/, b/ and bench/TASK/ (train.jsonl, test.jsonl).
WHAT is kept or again (training), eval, merge or geometry.
"""
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ['ACCELERATE_TORCH_DEVICE'] = 'fakecard'
os.environ['HF_DEACTIVATE_ASYNC_LOAD'] = '1'

import fake_card
import torch
import transformers.training_args
from safetensors.torch import load_file

from solar_repro import dpo, merge, sft
from solar_repro.core.config import load_profile
from solar_repro.eval import evaluate
from solar_repro.inference import forward
from solar_repro.merging.config import merge_config
from solar_repro.merging import engine
from solar_repro.merging.methods import Numbers
from solar_repro.models.adapters import AdaptedModel, save_adapter
from solar_repro.models.resident import Resident
from solar_repro.models.training import MicrobatchMixin
from solar_repro.paper import H6_TASKS

CARD = fake_card.NAME


def as_if_it_had_bf16():
    "transformers knows no such card."
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for name in ('is_torch_bf16_gpu_available', 'is_torch_bf16_available'):
        if hasattr(transformers.training_args, name): setattr(transformers.training_args, name, lambda *a, **k: True)


def settings_of(section, again):
    small = dict(nf4=False, optimizer='adamw_torch_fused', compute_dtype='bfloat16', batch_size=4, max_length=128,
                 max_tokens_per_microbatch=128 if section == 'sft' else 256, activation_checkpointing=again)
    small |= dict(lora_r=4) if section == 'sft' else {}
    return getattr(load_profile('a100'), section).model_copy(update=small)


def counted(work):
    "What happens inside a step, and in all: microbatches, host syncs there, tensors fetched there."
    inside, step = Counter(), MicrobatchMixin.training_step

    def watched(self, model, inputs, *args):
        before = sum(fake_card.SYNCS.values()), sum(fake_card.TO_CPU.values())
        out = step(self, model, inputs, *args)
        inside.update(steps=1, microbatches=len(inputs['microbatches']),
                      syncs=sum(fake_card.SYNCS.values()) - before[0],
                      fetched=sum(fake_card.TO_CPU.values()) - before[1])
        return out
    MicrobatchMixin.training_step = watched
    try:
        with fake_card.Card(): work()
    finally: MicrobatchMixin.training_step = step
    return dict(inside, all_syncs=dict(fake_card.SYNCS), all_fetched=dict(fake_card.TO_CPU))


def train(folder, again):
    "SFT, reference log-probabilities and DPO; again: activations are computed again, not kept."
    as_if_it_had_bf16()
    base, template, out, to = folder/'base', load_profile('a100').template, {}, folder/f'trained-{again}'
    rows = [dict(prompt=f'what is {i}', completion=f'{i} and {i} is {2*i}. '*3) for i in range(40)]
    pairs = [dict(prompt=f'what is {i}', chosen=f'{2*i} '*5, rejected=f'{3*i} '*4) for i in range(8)]
    x, y = settings_of('sft', again), settings_of('dpo', again)
    out['sft'] = counted(lambda: sft.train_sft(base, rows, to/'sft', x, template, 0, CARD))
    start, ref = AdaptedModel(base, ((to/'sft'/'adapter', 1.),)), []
    out['ref'] = counted(lambda: ref.append(dpo.reference_logps(start, pairs, y, template, CARD)))
    out['dpo'] = counted(lambda: dpo.train_dpo(start, pairs, ref[0], to/'dpo', y, template, 0, CARD))
    return out


def evaluated(folder):
    "Six benchmarks of a model that was put together on the card; the same on the CPU."
    forward.free_bytes = lambda device: 20*fake_card.GIB
    point, out = AdaptedModel(folder/'base'), {}
    fewshot = load_profile('smoke').eval.num_fewshot
    for task in H6_TASKS:
        scores = []
        for device in (CARD, 'cpu'):
            passes = Counter()
            with fake_card.Card():
                model = Resident(device).become(point)
                model.register_forward_pre_hook(lambda *args: passes.update(n=1))
                fake_card.SYNCS.clear()
                score, _ = evaluate(model, point.base, task, folder/'bench'/task, fewshot[task], 64)
            scores.append(score['score'])
            if device == CARD: out[task] = dict(passes=passes['n'], syncs=sum(fake_card.SYNCS.values()),
                                                fetched=sum(fake_card.TO_CPU.values()), where=dict(fake_card.SYNCS))
        out[task]['scores'] = scores
    return out


def merged(folder):
    "Merges on the card and on the CPU: whether they have the same bits, and how often the host waited."
    base, models, out = folder/'base', [folder/'a', folder/'b'], {}
    methods = dict(linear=dict(weights=[.4, .6]), slerp=dict(t=.5), task_arithmetic=dict(base=base),
                   ties=dict(base=base, density=.5), dare_ties=dict(base=base, density=.5))
    for method, x in methods.items():
        got = []
        for device in (CARD, 'cpu'):
            to = folder/f'{method}-{device}'
            with fake_card.Card(), patch.object(engine, '_check_options'): # which knows no such device
                engine.merge(merge_config(method, models, **x), to, device=device, threads=1)
                if device == CARD: waits = dict(fake_card.SYNCS), dict(fake_card.TO_CPU)
            got.append({k: v for f in sorted(to.glob('*.safetensors')) for k, v in load_file(f).items()})
        same = got[0].keys() == got[1].keys() and all(torch.equal(v, got[1][k]) for k, v in got[0].items())
        out[method] = dict(same=same, tensors=len(got[1]), waits=waits)
    return out


def adapter(folder, seed):
    "A random one on feed-forward layers of base/."
    drawn, tensors = torch.Generator().manual_seed(seed), {}
    for module, (n_out, n_in) in dict(up_proj=(128, 64), down_proj=(64, 128)).items():
        name = f'base_model.model.model.layers.0.mlp.{module}'
        tensors |= {f'{name}.lora_A.weight': torch.randn(4, n_in, generator=drawn),
                    f'{name}.lora_B.weight': torch.randn(n_out, 4, generator=drawn)*.02}
    return save_adapter(tensors, 4, 4, folder)


def geometries(folder):
    "Of two adapted models and their SLERP, and what storing one takes: on the card and on the CPU, equal?"
    base = folder/'base'
    a, b = (AdaptedModel(base, ((adapter(folder/f'adapter{k}', k), 1.),)) for k in (0, 1))
    merge.merge_models([a, b], 'slerp', Numbers(t=.5), folder/'slerp')
    models = dict(a=a, b=b, slerp=AdaptedModel(folder/'slerp'))
    def found(device):
        with fake_card.Card():
            tables = [*merge.geometry_of(models, base, device), merge.rounded(a, device)]
            return tables, dict(fake_card.SYNCS)
    (ours, waits), (theirs, none) = found(CARD), found('cpu')
    return dict(same=[x.equals(y) for x, y in zip(ours, theirs)], rows=[len(x) for x in ours], waits=waits, none=none,
                apart=ours[1].loc['a', 'slerp']/ours[1].loc['a', 'b'])


if __name__ == '__main__':
    work = dict(kept=partial(train, again=False), again=partial(train, again=True), eval=evaluated, merge=merged,
                geometry=geometries)
    print(json.dumps(work[sys.argv[1]](Path(sys.argv[2]))))
