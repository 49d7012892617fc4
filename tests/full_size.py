"""One microbatch of a profile's base in its full shape on fake tensors: bytes at the peak, dtypes of the products.

Run: python tests/full_size.py LAYERS PROFILE/sft|dpo/RANK ... ; a line of JSON for each, of so many layers at most.
It changes torch for its process: fake tensors stand on the CPU (a CPU build of torch cannot index fake CUDA tensors),
with a card's kernels for attention, norms and dropout. The model is lightened as `load_base` does it on a card, by
trials of a small one with numbers. The step is that of the trainers, so a product that escapes accelerate's autocast
is seen; in float16 its loss is scaled.
"""
import gc
import json
import sys
import weakref
from collections import Counter, defaultdict

import bitsandbytes as bnb
import peft.tuners.tuners_utils
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from solar_repro.core.config import load_profile
from solar_repro.dpo import SharedPrefixTrainer
from solar_repro.models import training
from solar_repro.models.loading import lighten
from solar_repro.planning.cost_model import base_shape
from solar_repro.planning.hardware import card
from solar_repro.sft import PackedTrainer

PRODUCTS = 'mm', 'addmm', 'bmm', 'linear', 'gemm_4bit'


class Ledger(TorchDispatchMode):
    "Counts the bytes of the storages that exist, and the products by the widest dtype that they read."
    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.products = {}, 0, 0, Counter()

    def see(self, t):
        s = t.untyped_storage()
        key = s._cdata
        if key in self.sizes: return
        self.sizes[key] = s.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(s, self.gone, key)

    def gone(self, key): self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        if name == '_local_scalar_dense': return 0.           # a fake tensor has no value
        out = func(*args, **(kwargs or {}))
        if any(name.startswith(p) for p in PRODUCTS):
            read = [x.dtype for x in args if isinstance(x, torch.Tensor)]
            if name.startswith('gemm_4bit'): del read[1:]     # weights in four bits, and what belongs to them
            self.products[str(max(read, key=lambda dtype: dtype.itemsize))] += 1
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.see(t)
        return out


def attention(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
    "The kernels that a card picks beside those for runs: flash without a mask, the memory-efficient one with it."
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0., is_causal, False, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float('-inf'))
    bias = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0., False, scale=scale)[0]


def dropout(x, p=.5, training=True, inplace=False):
    "A card's dropout, which keeps a mask of bytes."
    return torch.native_dropout(x, p, True)[0] if training and p else x


class Norm(torch.autograd.Function):
    "A card's kernel of RMSNorm, which keeps what it reads and a float32 number a row."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad): return torch.empty_like(ctx.saved_tensors[0])


computed = torch.nn.functional.rms_norm


def rms_norm(x, *args): return Norm.apply(x) if isinstance(x, FakeTensor) else computed(x, *args)


def as_on_a_card():
    "Let torch, PEFT and bitsandbytes take the ways that they take on a card."
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda kind='cpu': enabled('cpu')
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.nn.functional.dropout = dropout
    torch.nn.functional.rms_norm = rms_norm
    peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda self, *a, **k: None
    for f in ('uniform_', 'normal_'): setattr(torch.Tensor, f, lambda self, *a, **k: self)


class Quantized(bnb.nn.Linear4bit):
    "bitsandbytes' layer with fake bytes in place of a linear layer."
    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, None
        packed, state = bnb.functional.quantize_4bit(layer.weight.data, blocksize=64, compress_statistics=True,
                                                     quant_type='nf4')
        w = self.weight = nn.Parameter(packed, requires_grad=False)
        w.quant_state, w.compress_statistics, w.quant_type, w.bnb_quantized = state, True, 'nf4', True
        self.quant_state, self.compute_dtype, self.compute_type_is_set = state, torch.bfloat16, True
        self.support_avx512bf16_for_cpu = False


def without_weights(shape, n_layers):
    "A model of a shape without weights, with fewer layers where that is enough."
    config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                         num_hidden_layers=min(n_layers, shape.n_layers), num_attention_heads=shape.n_heads,
                         num_key_value_heads=shape.kv*shape.n_heads//shape.hidden, vocab_size=shape.vocab,
                         tie_word_embeddings=shape.tied, max_position_embeddings=4096)
    config._attn_implementation = 'sdpa'
    with torch.device('meta'): return LlamaForCausalLM(config)


def refill(model, wanted, dtype):
    "Fake tensors in place of a model's parameters, of those that are wanted; a tied one stays one."
    made = {}
    for m in list(model.modules()):
        for k, p in list(m._parameters.items()):
            if p is None or not wanted(p): continue
            if p not in made:
                new = torch.empty(p.shape, dtype=dtype, device='cpu')
                made[p] = nn.Parameter(new, requires_grad=p.requires_grad)
            m._parameters[k] = made[p]


def quantize(model):
    "Every linear layer but the head in four bits."
    for name, m in list(model.named_modules()):
        if type(m) is not nn.Linear or 'lm_head' in name: continue
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, Quantized(m))
    model.is_loaded_in_4bit = True


def with_numbers():
    "A small model of the same kinds of modules."
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, vocab_size=8))
    for p in model.parameters(): p.data = torch.randn(p.shape)      # nothing is initialised on our card
    return model


def adapted(model, rank, settings):
    "The model with float32 adapters on all linear layers."
    p_drop = getattr(settings, 'lora_dropout', 0.)
    move, nn.Module.to = nn.Module.to, lambda self, *a, **k: self
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=p_drop, target_modules='all-linear', task_type='CAUSAL_LM')
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    nn.Module.to = move
    refill(model, lambda p: p.requires_grad, torch.float32)
    return training.cast_by_autocast(model, settings, 'cuda').train()


def make_model(model, settings, rank):
    "The model that a stage trains, with gradients and the optimizer's two states."
    model.requires_grad_(False)
    refill(model, lambda p: True, getattr(torch, settings.compute_dtype))
    for m in model.modules():
        for k, b in list(m._buffers.items()):
            if b is not None: m._buffers[k] = torch.empty(b.shape, dtype=b.dtype, device='cpu')
    if settings.nf4: quantize(model)
    model = adapted(model, rank, settings)
    if settings.activation_checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained: p.grad = torch.zeros_like(p)
    return model, [torch.empty_like(p) for p in trained for _ in range(2)]


def integers(*shape): return torch.zeros(*shape, dtype=torch.long, device='cpu')


def packed(n_rows, n):
    "Packed rows of five examples each; two thirds of the tokens are predicted."
    short = [torch.arange(n//5, device='cpu')]*4 + [torch.arange(n - 4*(n//5), device='cpu')]
    at = integers(int(.65*n_rows*n))
    inputs = dict(input_ids=integers(n_rows, n), position_ids=torch.cat(short).expand(n_rows, n))
    runs = training.runs_of([[(len(x), 0) for x in short]]*n_rows, n)
    return dict(inputs=inputs, runs=runs, at=at, targets=torch.zeros_like(at), n=n_rows)


def pairs(n_rows, n):
    "Pairs of n tokens, an eighth of them the prompt."
    sizes = [n//2, n - n//8 - n//2]*n_rows
    at, ref = integers(sum(sizes)), torch.zeros(n_rows, device='cpu')
    inputs = dict(input_ids=integers(n_rows, n), position_ids=integers(n_rows, n))
    chosen, rejected = sizes[:2]
    runs = training.runs_of([[(n//8, 0), (chosen, n//8), (rejected, n//8)]]*n_rows, n)
    return dict(inputs=inputs, runs=runs, segments=integers(n_rows, n), at=at, targets=torch.zeros_like(at),
                sizes=sizes, n=n_rows, ref_chosen_logps=ref, ref_rejected_logps=ref)


def accelerator_of(dtype):
    "accelerate's autocast; float16, which it does not begin without a card, is told to it afterwards."
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision='bf16', cpu=True)
    if dtype == 'float16':
        accelerator.state._mixed_precision = 'fp16'
        accelerator.scaler = torch.amp.GradScaler('cpu')
    return accelerator


def trainer_of(kind, dtype):
    "A trainer with what a step asks of it and no more."
    cls = dict(sft=PackedTrainer, dpo=SharedPrefixTrainer)[kind]
    t = cls.__new__(cls)
    t.accelerator, t.beta = accelerator_of(dtype), .1
    t._metrics, t._prepare_inputs = dict(train=defaultdict(list)), lambda x: x
    return t


def lightened(model, small):
    "Replace what `lighten` replaces in a small model of the same kinds, whose numbers it can try; how many."
    before = {n: type(m) for n, m in small.named_modules()}
    lighten(small)
    light = {before[n]: type(m) for n, m in small.named_modules() if type(m) is not before[n]}
    found = [m for m in model.modules() if type(m) in light]
    for m in found: m.__class__ = light[type(m)]
    return len(found)


def count(profile, kind, rank, n_layers):
    "Bytes of one microbatch at its peak, and the dtypes of its products."
    p = load_profile(profile)
    settings = getattr(p, kind)
    row = settings.max_length if kind == 'sft' else 2*settings.max_length
    n_rows = settings.max_tokens_per_microbatch//row
    ledger = Ledger()
    training.can_run = lambda base: card(None, p).bf16     # as on the profile's card
    trainer, model = trainer_of(kind, settings.compute_dtype), without_weights(base_shape(p), n_layers)
    assert lightened(model, with_numbers()) == 3*len(model.model.layers) + 1   # two norms, a SwiGLU; a last norm
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        bnb.functional.name2qmap['dynamic'] = torch.empty(256, device='cpu')
        model, optimizer = make_model(model, settings, rank)
        gc.collect()
        batch = (packed if kind == 'sft' else pairs)(n_rows, row)
        steady, ledger.peak, ledger.products = ledger.now, ledger.now, Counter()
        trainer.training_step(model, dict(microbatches=[batch], n=batch['n']))
    return dict(profile=profile, kind=kind, rank=rank, n_tok=n_rows*row, steady=steady, peak=ledger.peak,
                products=dict(ledger.products), optimizer=len(optimizer))


if __name__ == '__main__':
    as_on_a_card()
    for case in sys.argv[2:]:
        profile, kind, rank = case.split('/')
        print(json.dumps(count(profile, kind, int(rank), int(sys.argv[1]))), flush=True)
