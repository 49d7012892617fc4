"""A second device that is the CPU in disguise: its tensors refuse to meet CPU tensors; host syncs are counted.

torch's PrivateUse1 with wrapper tensors: every operation runs on the CPU, and what is checked is where its inputs live.
Importing this changes torch for its whole process. NF4 cannot run on it: bitsandbytes asks for a kernel of the device.
"""
import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = 'fakecard'
GIB = 2**30
SYNCS, TO_CPU = Counter(), Counter()                        # by place: the host waits; tensors fetched
# where CUDA, too, lets CPU tensors in: copies, and indices
MAY_MIX = {'_to_copy', 'copy_', '_copy_from', 'index', 'index_put', 'index_put_', '_index_put_impl_'}


class Backend:
    "What torch asks a device's module for."
    def is_available(self): return True
    def is_initialized(self): return True
    def device_count(self): return 1
    def current_device(self): return 0
    def get_rng_state(self, *args): return torch.get_rng_state()
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def mem_get_info(self, *args): return 20*GIB, 24*GIB
    def memory_reserved(self, *args): return 0
    def memory_allocated(self, *args): return 0
    def _is_in_bad_fork(self): return False
    def _nothing(self, *args): pass
    set_device = manual_seed = manual_seed_all = set_rng_state = empty_cache = synchronize = _nothing


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
CARD = torch.device(NAME, 0)


def on_card(x): return isinstance(x, torch.Tensor) and x.device.type == NAME


def place():
    "The line of the library that is at work."
    frames = [f for f in traceback.extract_stack() if 'solar_repro' in f.filename]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else 'elsewhere'


class OnCard(torch.Tensor):
    "A CPU tensor that says it is on the card."
    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(), dtype=raw.dtype, device=CARD,
                                                   storage_offset=raw.storage_offset(), requires_grad=False)

    def __init__(self, raw): self.raw = raw
    def untyped_storage(self): return self.raw.untyped_storage()
    def data_ptr(self): return self.raw.data_ptr()
    def __repr__(self, **kwargs): return f'OnCard({self.raw!r})'
    def numpy(self, *args, **kwargs): raise TypeError(f"can't convert {NAME} tensor to numpy at {place()}")

    def tolist(self):
        SYNCS[place()] += 1
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


def check(func, leaves):
    "Raise where a CPU tensor that is no number meets one of the card."
    for x in leaves:
        if isinstance(x, torch.Tensor) and not on_card(x) and x.dim() > 0:
            raise RuntimeError(f'{func}: a CPU tensor {tuple(x.shape)} meets {NAME} at {place()}')


def bare(x):
    "What an argument is on the CPU."
    if on_card(x): return x.raw
    return torch.device('cpu') if isinstance(x, torch.device) and x.type == NAME else x


def run(func, args, kwargs):
    "An operation on the CPU, its results on the device where a card would have them."
    name, leaves = func.__name__.split('.')[0], tree_leaves((args, kwargs))
    ours = [x for x in leaves if on_card(x)]
    if ours and name not in MAY_MIX: check(func, leaves)
    target = torch.device(kwargs['device']) if kwargs.get('device') is not None else None
    if name == '_local_scalar_dense': SYNCS[place()] += 1
    into_cpu = name in ('copy_', '_copy_from') and not on_card(args[name == '_copy_from'])
    if ours and (into_cpu or target is not None and target.type == 'cpu'): TO_CPU[place()] += 1
    on_cpu = tree_map(bare, kwargs)
    if on_cpu.get('pin_memory'): on_cpu['pin_memory'] = False
    out = func(*tree_map(bare, args), **on_cpu)
    same = {id(x.raw): x for x in ours}
    to_card = target.type == NAME if target is not None else bool(ours)

    def disguised(o):
        if not isinstance(o, torch.Tensor): return o
        if id(o) in same: return same[id(o)]
        return OnCard(o) if to_card else o
    return tree_map(disguised, out)


class Card(TorchDispatchMode):
    "Within it tensors can be made on the card; counts begin anew."
    def __enter__(self):
        SYNCS.clear()
        TO_CPU.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = kwargs.get('device')
        if asked is not None and torch.device(asked).type == NAME or any(map(on_card, tree_leaves((args, kwargs)))):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return OnCard(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return OnCard(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    bare(target).copy_(bare(source))
    return target


def _lowered(op):
    "A product as autocast has it: float32 becomes bfloat16."
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def product(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            lower = [x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
                     for x in args]
            return op(*lower, **kwargs)
    return product


_aten, _autocast = torch.library.Library('aten', 'IMPL'), torch.library.Library('_', 'IMPL')
_autocast.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
for _name, _made in (('empty.memory_format', _empty), ('empty_strided', _empty_strided), ('_copy_from', _copy_from)):
    _aten.impl(_name, _made, 'PrivateUse1')
for _name in ('linear', 'matmul', 'mm', 'bmm'):
    _aten.impl(_name, _lowered(getattr(torch.ops.aten, _name).default), 'AutocastPrivateUse1')
