"Merging, comparing and exporting whole checkpoints, by functions and by the shell."
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from common import ENV, python
from forked import forked, Forked
from safetensors.torch import load_file, save_file

from solar_repro.merging import arithmetic, engine as merging, shards
from solar_repro.models.adapters import AdaptedModel
from solar_repro.models.checkpoints import compare, DTYPES, open_checkpoint, together
from solar_repro.reports.cli import main
from solar_repro.merging.config import from_yaml, merge_config, to_yaml
from solar_repro.merging.arithmetic import kept_at_random
from solar_repro.merging.engine import are_adapters, merge
from solar_repro.merging.export import export, merge_adapters
from solar_repro.merging.shards import private_folder

SHELL = 'from solar_repro.reports.cli import main; raise SystemExit(main())'
KILLED = '''
import os, signal
from solar_repro.merging import shards
named, rename = [], os.rename
def killed(a, b):
    if str(b).endswith('.safetensors'):
        if len(named) == 4: os.kill(os.getpid(), signal.SIGKILL)
        named.append(b)
    rename(a, b)
shards.os = type('os', (), dict(vars(os), rename=staticmethod(killed)))
''' + SHELL # dies where a fifth weight file would get its name


def write(folder: Path, tensors: dict, n_files: int = 1, **config) -> Path:
    "A checkpoint of made-up tensors; with the names of a causal model it would lack most of them."
    folder.mkdir(parents=True)
    config = dict(model_type='llama', architectures=['LlamaModel'], dtype='bfloat16') | config
    (folder/'config.json').write_text(json.dumps(config))
    names = sorted(tensors)
    where = {n: f'model-{i*n_files//len(names)+1:05}-of-{n_files:05}.safetensors' for i, n in enumerate(names)}
    if n_files > 1: (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    for f in set(where.values()):
        part = {n: tensors[n].contiguous() for n in names if where[n] == f}
        save_file(part, folder/(f if n_files > 1 else 'model.safetensors'), metadata=dict(format='pt'))
    return folder


def read(folder: Path) -> dict:
    found = {n: w for f in sorted(folder.glob('*.safetensors')) for n, w in load_file(f).items()}
    assert found
    return found


def noise(seed: int, like: dict | None = None, size: float = 1.) -> dict:
    "Random tensors of awkward sizes, or a model near another."
    g = torch.Generator().manual_seed(seed)
    if like:
        return {
            n: (w.double() + size * torch.randn(w.shape, generator=g, dtype=torch.double)).to(w.dtype)
            for n, w in like.items()
        }
    shapes = {
        'model.embed_tokens.weight': (1001, 33),
        'model.layers.0.mlp.up_proj.weight': (257, 129),
        'model.layers.1.mlp.up_proj.weight': (257, 129),
        'model.layers.2.mlp.up_proj.weight': (1, 1),
        'model.norm.weight': (7,),
        'lm_head.weight': (5_000_003,),        # does not fit one chunk of a file
    }
    return {n: torch.randn(s, generator=g) for n, s in shapes.items()}


def to(tensors: dict, dtype) -> dict: return {n: w.to(dtype) for n, w in tensors.items()}


def run(*words: str) -> subprocess.CompletedProcess: return forked(SHELL, *words, env=ENV)


def said(capsys, *words) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    return code, *capsys.readouterr()


# ---- values

def ulps(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    "How many numbers of their dtype lie between them."
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    line = lambda v: torch.where((i := v.view(ints).long()) < 0, -(i & ((1 << (8*x.element_size() - 1)) - 1)), i)
    return (line(x) - line(y)).abs()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('weights', [(.5, .5), (.4, .6), (.2, .3, .5), (1.7, -.7)])
def test_average_against_float64(tmp_path, dtype, weights):
    first = noise(0)
    if weights != (.5, .5): first['lm_head.weight'] = first['lm_head.weight'][:50_003]      # large once is enough
    models = [to(noise(i, first, .5), dtype) for i in range(1, len(weights)+1)]
    paths = [write(tmp_path/f'm{i}', m, n_files=1+i) for i, m in enumerate(models)]
    got = read(merge(merge_config('linear', paths, weights), tmp_path/'out', shard_bytes=400_000))
    assert set(got) == set(first)
    for n in first:
        want = sum(w*m[n].double() for w, m in zip(weights, models)).to(dtype)
        assert got[n].dtype == dtype and got[n].shape == first[n].shape and ulps(got[n], want).max() <= 1, n


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('t', [0., .3, .5, 1.])
def test_slerp_against_float64(tmp_path, dtype, t):
    A = noise(0)
    if t != .3: A['lm_head.weight'] = A['lm_head.weight'][:50_003]                         # large once is enough
    B = noise(1, A, .7)
    B['model.norm.weight'] = A['model.norm.weight']*1.0001       # parallel: linear
    A, B = to(A, dtype), to(B, dtype)
    out = merge(merge_config('slerp', [write(tmp_path/'A', A), write(tmp_path/'B', B, 3)], t=t), tmp_path/'out')
    got, record = read(out), json.loads((out/'slerp.json').read_text())
    parallel = ['model.layers.2.mlp.up_proj.weight', 'model.norm.weight']      # one number is parallel to another
    assert [n for n in sorted(A) if record[n]['fell_back']] == parallel
    for n in A:
        a, b = A[n].double(), B[n].double()
        angle = torch.acos(((a*b).sum()/a.norm()/b.norm()).clamp(-1, 1))
        want = (torch.sin((1-t)*angle)*a + torch.sin(t*angle)*b)/torch.sin(angle)
        if record[n]['fell_back']: want = (1-t)*a + t*b
        assert ulps(got[n], want.to(dtype)).max() <= 1, n


def test_bfloat16_is_rounded_once(tmp_path):
    "So little above the middle of 130/128 and 131/128 that float32 holds the middle, which goes to the even 130."
    row = lambda v: {'model.layers.0.w': torch.tensor([v, -v]).bfloat16()}
    a, b = write(tmp_path/'a', row(130/64)), write(tmp_path/'b', row(2**-26))
    w = 130.5/260
    exact = torch.tensor(w*130/64 + (1-w)*2**-26, dtype=torch.float64)
    assert exact > 130.5/128 == exact.float() and exact.bfloat16() == 130/128
    got = read(merge(merge_config('linear', [a, b], [w, 1-w]), tmp_path/'out'))
    assert got['model.layers.0.w'].tolist() == [131/128, -131/128]


def test_methods_by_hand(tmp_path):
    row = lambda *x: {'model.layers.0.w': torch.tensor(x)}
    C = write(tmp_path/'C', row(1., 1., 1., 1.))
    A = write(tmp_path/'A', row(3., 1.5, 0., 1.))        # changes 2, .5, -1, 0
    B = write(tmp_path/'B', row(2., 1., 2., -3.))        # changes 1, 0, 1, -4

    def values(i, *a, **kw): return read(merge(merge_config(*a, **kw), tmp_path/f'out{i}'))['model.layers.0.w'].tolist()
    assert values(0, 'linear', [A, B], [.25, .75]) == [2.25, 1.125, 1.5, -2.]
    assert values(1, 'linear', [A, B], [1, 3], normalize=True) == [2.25, 1.125, 1.5, -2.]
    assert values(2, 'task_arithmetic', [A, B], [1, -1], base=C, lam=.5) == [1.5, 1.25, 0., 3.]
    # kept: (2, ., -1, .) and (1, ., 1, -4), as 1 ties with 1; the third: -1 and 1 cancel, so plus
    assert values(3, 'ties', [A, B], base=C, density=.5) == [2.5, 1., 2., -3.]
    assert values(4, 'ties', [A, B], [3, 1], base=C, density=1.) == [2.75, 1.5, 0., -3.]   # third: -3 outvotes 1
    x, y = ({'model.layers.0.w': torch.tensor(v)} for v in ([1., 0.], [.5, math.sqrt(.75)]))
    half = read(merge(merge_config('slerp', [write(tmp_path/'x', x), write(tmp_path/'y', y)]), tmp_path/'xy'))
    assert half['model.layers.0.w'].tolist() == pytest.approx([math.sqrt(.75), .5], abs=1e-7)     # 30 degrees of 60


@pytest.mark.parametrize('method', ['dare_linear', 'dare_ties'])
def test_dare_is_the_same_however_it_is_cut(tmp_path, method, monkeypatch):
    C = noise(0); A, B = (noise(i, C, .5) for i in (1, 2))
    paths = [write(tmp_path/n, T) for n, T in dict(A=A, B=B).items()]
    base = write(tmp_path/'C', C)

    def make(name, seed, **kw):
        r = merge_config(method, paths, base=base, density=.3, seed=seed)
        return read(merge(r, tmp_path/name, **kw))
    one = make('one', 5)
    monkeypatch.setattr(shards, 'CHUNK', 1 << 16); monkeypatch.setattr(arithmetic, 'PIECE', 1000)
    two, other = make('two', 5, threads=3, shard_bytes=300_000), make('other', 6)
    assert all(torch.equal(one[n], two[n]) for n in C)
    assert not torch.equal(one['lm_head.weight'], other['lm_head.weight'])
    if method == 'dare_linear':
        n, total = 'lm_head.weight', 0.
        for i, T in enumerate((A, B)):
            total = total + (T[n].double()-C[n].double())*kept_at_random(f'5 {n} {i}', .3, 0, len(C[n]))/.3
        assert torch.allclose(one[n].double(), C[n].double()+total, rtol=1e-6, atol=1e-6)
        drift = (one[n]-C[n]).double().mean() - sum((T[n]-C[n]).double().mean() for T in (A, B))
        assert abs(drift) < 4*math.sqrt(2*.25*(1/.3-1)/len(C[n]))                        # thinning keeps the mean


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('method', ['linear', 'slerp', 'ties', 'dare_ties'])
def test_gpu_gives_what_the_processor_gives(tmp_path, method):
    C = to(noise(0), torch.bfloat16)
    paths = [write(tmp_path/f'm{i}', noise(i, C, .5)) for i in (1, 2)]
    on_base = {} if method in ('linear', 'slerp') else dict(base=write(tmp_path/'C', C), density=.3)
    r = merge_config(method, paths, **on_base)
    one, two = read(merge(r, tmp_path/'one')), read(merge(r, tmp_path/'two', device='cuda'))
    assert all(ulps(one[n], two[n]).max() <= 1 for n in one)


# ---- what is written

@pytest.fixture(scope='module')
def pair_files(tmp_path_factory) -> tuple[Path, Path]:
    A, folder = to(noise(0), torch.bfloat16), tmp_path_factory.mktemp('pair')
    return write(folder/'A', A, 2), write(folder/'B', noise(1, A, .5))


@pytest.fixture
def pair(tmp_path, pair_files) -> tuple[Path, ...]:
    "Copies, which a test may damage."
    return tuple(Path(shutil.copytree(p, tmp_path/p.name)) for p in pair_files)


def test_bounded_files_index_and_card(tmp_path, pair):
    out = merge(merge_config('linear', pair, [.4, .6]), tmp_path/'out', shard_bytes=100_000)
    index = json.loads((out/'model.safetensors.index.json').read_text())
    assert index['weight_map'] == {n: e.file.name for n, e in open_checkpoint(out).entries.items()}
    sizes = dict.fromkeys(open_checkpoint(out).files, 0)
    for e in open_checkpoint(out).entries.values(): sizes[e.file] += e.stop-e.start
    assert len(sizes) >= 3 and sum(v > 100_000 for v in sizes.values()) == 1     # one tensor alone is larger
    assert index['metadata']['total_size'] == sum(sizes.values())
    card = (out/'README.md').read_text()
    head = yaml.safe_load(card.split('---')[1])
    assert head['base_model'] == ['A', 'B'] and 'linear' in head['tags'] and f'torch {torch.__version__}' in card
    files = [f for p in pair for f in sorted(p.glob('*.safetensors'))]
    assert len(files) == 3 and all(hashlib.sha256(f.read_bytes()).hexdigest() in card for f in files)
    assert from_yaml((out/'mergekit_config.yml').read_text()) == merge_config('linear', pair, [.4, .6])
    assert not list(tmp_path.glob('.*merging'))


@pytest.fixture(scope='module')
def llamas(tmp_path_factory) -> list[Path]:
    "A base and two that start from it, as transformers saves them, with tokenizer and generation config."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from solar_repro.models.loading import quiet
    from solar_repro.tiny.base import random_base
    tmp = tmp_path_factory.mktemp('llamas')
    with quiet():
        base = random_base(tmp/'base')
        for i in (1, 2):
            m = AutoModelForCausalLM.from_pretrained(base)
            g = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for p in m.parameters(): p.add_(.02*torch.randn(p.shape, generator=g))
            m.generation_config.max_new_tokens = 7
            m.save_pretrained(tmp/f'm{i}', max_shard_size='100KB')
            AutoTokenizer.from_pretrained(base).save_pretrained(tmp/f'm{i}')
    return [Path(base), tmp/'m1', tmp/'m2']


def test_transformers_loads_what_is_merged(tmp_path, llamas):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    _, one, two = llamas
    out = merge(merge_config('linear', [one, two], [.25, .75]), tmp_path/'out', shard_bytes=100_000)
    got = AutoModelForCausalLM.from_pretrained(out)
    a, b = (AutoModelForCausalLM.from_pretrained(p) for p in (one, two))
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True): p.mul_(.25).add_(q, alpha=.75)
    ids = torch.arange(30)[None]
    assert torch.allclose(got(ids).logits, a(ids).logits, atol=1e-5)
    assert not torch.allclose(got(ids).logits, b(ids).logits, atol=1e-2)
    assert AutoTokenizer.from_pretrained(out)('2 + 3') == AutoTokenizer.from_pretrained(one)('2 + 3')
    assert got.generation_config.max_new_tokens == 7


@pytest.mark.parametrize('other', [
    dict(rope_parameters=dict(rope_theta=10000.0, rope_type='default')),     # as transformers 5 writes it
    dict(rope_theta=10000, head_dim=8, tie_word_embeddings=False),
    dict(num_key_value_heads=2, rms_norm_eps=1e-6)])
def test_one_configuration_in_several_spellings(tmp_path, other):
    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    one = write(tmp_path/'hub', noise(0), rope_theta=10000.0, **common)
    two = write(tmp_path/'tuned', noise(1), **common, **other)
    assert len(read(merge(merge_config('linear', [one, two]), tmp_path/'out'))) == 6
    third = write(tmp_path/'third', noise(2), **common, **other | dict(rope_parameters=dict(rope_theta=5e5)))
    with pytest.raises(ValueError, match='expected one architecture'):
        merge(merge_config('linear', [one, third]), tmp_path/'refused')


def test_no_program_is_copied_and_what_links_lead_to_is(tmp_path):
    "A tokenizer that was linked from elsewhere was left out, and only the card of the merge said so."
    hub = tmp_path/'models--o--n'
    one = write(hub/'snapshots'/'0', noise(0), transformers_weights='model.safetensors')
    two = write(tmp_path/'two', noise(1))
    (hub/'blobs').mkdir()
    (hub/'blobs'/'5').write_text('{}')
    (one/'generation_config.json').symlink_to('../../blobs/5')               # as the hub's cache has its files
    (tmp_path/'elsewhere').write_text('mine')
    (one/'special_tokens_map.json').symlink_to(tmp_path/'elsewhere')
    for name in ('tokenizer.py', 'tokenizer_config.py', 'modeling_x.py', 'vocab.py'):
        (one/name).write_text('raise SystemExit')
        (one/name).chmod(0o755)
    (one/'merges.txt').write_text('a b')
    (one/'merges.txt').chmod(0o755)
    out = merge(merge_config('linear', [one, two]), tmp_path/'out')
    exported = export(AdaptedModel(one), tmp_path/'exported')
    common = ['README.md', 'config.json', 'generation_config.json', 'merges.txt', 'model.safetensors',
              'special_tokens_map.json']
    for folder, files in ((out, sorted([*common, 'mergekit_config.yml'])), (exported, common)):
        assert sorted(f.name for f in folder.iterdir()) == files
        assert not any(f.is_symlink() or f.stat().st_mode & 0o111 for f in folder.iterdir())
        assert (folder/'special_tokens_map.json').read_text() == 'mine'
    assert 'transformers_weights' not in json.loads((out/'config.json').read_text())


# ---- killed, and run again

def test_killed_and_run_again(tmp_path):
    g = torch.Generator().manual_seed(0)
    A = {f'model.layers.{i}.w': torch.randn(500, 4000, generator=g).bfloat16() for i in range(12)}
    a, b = write(tmp_path/'A', A), write(tmp_path/'B', noise(1, A, .5))
    words = ['merge', *'--method ties --density .5 --shard-size .008 --threads 1 --base'.split(), a, a, b]
    p = Forked(KILLED, *words, tmp_path/'out', env=ENV)
    err = p.communicate()[1]
    done = sorted(tmp_path.glob('.out.*.merging/*.safetensors.json'))
    assert p.returncode == -signal.SIGKILL and 3 <= len(done) < 5 and not (tmp_path/'out').exists(), err
    [private] = tmp_path.glob('.out.*.merging')
    finished = {f.stem: (private/'model'/f.stem).stat().st_mtime_ns for f in done}
    (private/'model-00012-of-00012.safetensors.part').write_bytes(b'half')
    assert run(*words, tmp_path/'out').returncode == 0
    assert finished
    for f, t in finished.items(): assert (tmp_path/'out'/f).stat().st_mtime_ns == t      # not written again
    assert run(*words, tmp_path/'whole').returncode == 0
    again, whole = read(tmp_path/'out'), read(tmp_path/'whole')
    assert len(again) == 12 and all(torch.equal(again[n], whole[n]) for n in whole)
    names = lambda folder: sorted(f.name for f in folder.iterdir())
    assert names(tmp_path/'out') == names(tmp_path/'whole') and not list(tmp_path.glob('.*merging'))


def test_what_another_merge_left_is_not_taken_for_this_one(tmp_path, pair):
    plan = tmp_path/'.out.0123456789ab.merging'
    plan.mkdir(); (plan/'model.safetensors').write_bytes(b'other'); (plan/'model.safetensors.json').write_text('{}')
    out = merge(merge_config('linear', pair), tmp_path/'out')
    assert len(read(out)) == 6 and not plan.exists()


def test_an_input_that_changed_is_read_again(tmp_path, pair, monkeypatch):
    r = merge_config('linear', pair, [.5, .5])
    with monkeypatch.context() as m:
        m.setattr(merging, 'publish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))  # stopped at the very end
        with pytest.raises(KeyboardInterrupt): merge(r, tmp_path/'out')
    B = {n: w*2 for n, w in read(pair[1]).items()}
    save_file(B, pair[1]/'model.safetensors')
    A, got = read(pair[0]), read(merge(r, tmp_path/'out'))
    assert all(torch.equal(got[n], ((A[n].double()+B[n].double())/2).bfloat16()) for n in A)


@pytest.fixture
def stopped(tmp_path, pair, monkeypatch):
    "A merge into two files that was stopped when both were finished: its configuration, and the private folder."
    r = merge_config('linear', pair, [.5, .5])
    with monkeypatch.context() as m:
        m.setattr(merging, 'publish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): merge(r, tmp_path/'out', shard_bytes=11_000_000)
    [private] = tmp_path.glob('.out.*.merging')
    return r, private


@pytest.mark.parametrize('how', ['flip', 'cut', 'gone', 'record flipped', 'record cut', 'stray'])
def test_a_damaged_finished_file_is_not_published(tmp_path, pair, stopped, how):
    r, private = stopped
    file = sorted((private/'model').glob('*.safetensors'))[-1]
    record = private/f'{file.name}.json'
    damaged = record if how.startswith('record') else file
    data = bytearray(damaged.read_bytes())
    if how.endswith('flip') or how.endswith('flipped'): data[len(data)//2] ^= 1
    if how.endswith('cut'): data = data[:-9]
    if how == 'stray': (private/'model'/'other.safetensors').write_bytes(b'stray')
    elif how == 'gone': damaged.unlink()
    else: damaged.write_bytes(data)
    got, whole = merge(r, tmp_path/'out', shard_bytes=11_000_000), merge(r, tmp_path/'whole', shard_bytes=11_000_000)
    assert {f.name: f.read_bytes() for f in got.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_an_input_changed_with_its_size_and_time_is_read_again(tmp_path, pair, stopped):
    r, private = stopped
    file = pair[1]/'model.safetensors'
    was = file.stat()
    save_file({n: w*2 for n, w in read(pair[1]).items()}, file, metadata=dict(format='pt'))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert file.stat().st_size == was.st_size and file.stat().st_mtime_ns == was.st_mtime_ns
    A, B, got = read(pair[0]), read(pair[1]), read(merge(r, tmp_path/'out', shard_bytes=11_000_000))
    assert all(torch.equal(got[n], ((A[n].double()+B[n].double())/2).bfloat16()) for n in A)


def test_four_equal_merges_at_once_leave_one_folder(tmp_path, pair):
    words = ['merge', '--method', 'linear', *pair, tmp_path/'out']
    several = [Forked(SHELL, *words, env=ENV) for _ in range(4)]
    heard = [p.communicate()[1] for p in several]
    assert sorted(p.returncode for p in several) == [0, 2, 2, 2], heard
    assert sum('another process' in e or 'exists' in e for e in heard) == 3, heard
    alone = merge(merge_config('linear', pair), tmp_path/'alone')
    assert sorted(f.name for f in (tmp_path/'out').iterdir()) == sorted(f.name for f in alone.iterdir())
    assert sorted(f.name for f in tmp_path.iterdir()) == ['A', 'B', 'alone', 'out']


def test_memory_does_not_grow_with_the_model(tmp_path):
    "A quarter of a gigabyte each, of zeros that take no place on the disk."
    n_bytes, shape = 1 << 28, [1 << 14, 1 << 13]
    header = json.dumps({'layers.0.w': dict(dtype='BF16', shape=shape, data_offsets=[0, n_bytes])}).encode()
    for m in 'AB':
        (tmp_path/m).mkdir()
        (tmp_path/m/'config.json').write_text('{}')
        with open(tmp_path/m/'model.safetensors', 'wb') as f:
            f.write(len(header).to_bytes(8, 'little') + header)
            f.truncate(8+len(header)+n_bytes)
    code = f'''
import re
from pathlib import Path
from solar_repro.merging.config import merge_config
from solar_repro.merging.engine import merge
anon = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
peak, before = [0], anon()
def on_progress(done, total): peak[0] = max(peak[0], anon())
r = merge_config('slerp', ['{tmp_path}/A', '{tmp_path}/B'])
merge(r, Path('{tmp_path}/out'), threads=4, on_progress=on_progress)
print(before, peak[0])
'''
    before, peak = map(float, python('-c', code).stdout.split())
    # MiB; each of the four threads has 8 to write and 4 to compute in, and how many cores there are does not matter
    assert 0 < peak < 1024 and peak-before < 150, (before, peak)
    assert (tmp_path/'out'/'model.safetensors').stat().st_size > 1 << 28


# ---- refusals

def test_pickle_advice_works(tmp_path, llamas):
    "The line that a refusal gives makes a checkpoint that is not refused."
    import re
    import shlex
    one = llamas[1]; old = tmp_path/'old'; old.mkdir()
    (old/'config.json').write_bytes((one/'config.json').read_bytes()); torch.save(read(one), old/'pytorch_model.bin')
    with pytest.raises(ValueError) as e: open_checkpoint(old)
    command = shlex.split(re.search(r'python -c ".*?"', str(e.value))[0])
    python(*command[1:])
    assert compare(one, f'{old}-safetensors')['distance'].max() == 0


def test_normalize_is_asked_for(tmp_path, pair, capsys):
    start = 'merge', '--method', 'linear', '--weights'
    assert said(capsys, *start, '1', '3', '--normalize', *pair, tmp_path/'out')[0] == 0
    assert said(capsys, *start, '0.25', '0.75', *pair, tmp_path/'same')[0] == 0
    one, two = read(tmp_path/'out'), read(tmp_path/'same')
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_disk_without_room_is_refused(tmp_path, pair, capsys, monkeypatch):
    monkeypatch.setattr(shards.shutil, 'disk_usage', lambda p: type('Usage', (), dict(free=10_000)))
    code, _, err = said(capsys, 'merge', '--method', 'linear', *pair, tmp_path/'out')
    assert code == 2 and '0.01 GB to write' in err and 'Free some space' in err and not (tmp_path/'out').exists()


@pytest.mark.parametrize('dtype', ['BF16', 'F16', 'F32'])
@pytest.mark.parametrize('method', ['task_arithmetic', 'ties'])
def test_a_result_too_large_for_its_dtype_is_refused(tmp_path, dtype, method):
    C = to(noise(0), DTYPES[dtype])
    a, c = write(tmp_path/'A', noise(1, C, .5)), write(tmp_path/'C', C)
    lam = 1e6 if dtype == 'F16' else 1e39
    with pytest.raises(ValueError, match=f'too large for {dtype}'):
        merge(merge_config(method, [a], base=c, lam=lam), tmp_path/'out')
    assert not (tmp_path/'out').exists() and not list(tmp_path.glob('.*merging'))


def test_an_interrupt_says_what_is_kept(tmp_path, pair, capsys, monkeypatch):
    words = 'merge', '--method', 'linear', *pair, tmp_path/'out'
    with monkeypatch.context() as m:
        m.setattr(merging, 'publish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        code, out, err = said(capsys, *words)
    [private] = tmp_path.glob('.out.*.merging')
    assert code == 130 and not out and f'kept in {private}. Run the same again' in err and 'Traceback' not in err
    assert said(capsys, *words)[0] == 0 and not private.exists()


def test_two_processes_do_not_write_one_target(tmp_path, pair):
    r = merge_config('linear', pair)
    with private_folder(tmp_path/'out', dict(of='another merge')), pytest.raises(OSError, match='another process'):
        merge(r, tmp_path/'out')
    assert len(read(merge(r, tmp_path/'out'))) == 6


# ---- recipes

def test_mergekit_recipe_gives_each_tensor_its_number(tmp_path, pair, capsys):
    a, b = pair
    config = tmp_path/'config.yml'
    config.write_text(f'''
slices:
  - sources:
      - model: {a}
        layer_range: [0, 3]
      - model: {b}
        layer_range: [0, 3]
merge_method: slerp
base_model: {b}
parameters:
  t:
    - filter: mlp
      value: [0, 0.25, 1]
    - filter: embed
      value: 0.75
    - value: 0
dtype: bfloat16
tokenizer_source: base
''')
    assert said(capsys, 'merge', config, tmp_path/'out')[0] == 0
    got, A, B = read(tmp_path/'out'), read(a), read(b)
    t = {
        'model.embed_tokens.weight': 0.75,
        'model.layers.0.mlp.up_proj.weight': 0,
        'model.layers.1.mlp.up_proj.weight': 0.25,
        'model.layers.2.mlp.up_proj.weight': 1,
        'model.norm.weight': 0,
        'lm_head.weight': 0,
    }
    for n, w in got.items():                                      # the base is t=0
        x, y = B[n].double(), A[n].double()
        angle = torch.acos(((x*y).sum()/x.norm()/y.norm()).clamp(-1, 1))
        between = (torch.sin((1-t[n])*angle)*x + torch.sin(t[n]*angle)*y)/torch.sin(angle)
        want = {0: x, 1: y}.get(t[n], between)
        assert ulps(w, want.bfloat16()).max() <= 1, n
    again = tmp_path/'again.yml'; again.write_bytes((tmp_path/'out'/'mergekit_config.yml').read_bytes())
    assert said(capsys, 'merge', again, tmp_path/'out2')[0] == 0
    assert all(torch.equal(w, got[n]) for n, w in read(tmp_path/'out2').items())


@pytest.mark.parametrize(
    'r',
    [
        merge_config('linear', ['A', 'B', 'C'], [0.2, 0.3, 0.5]),
        merge_config('linear', ['A', 'B'], [1, 2], normalize=True, dtype='float32'),
        merge_config('slerp', ['A', 'B'], t=0.1),
        merge_config('task_arithmetic', ['A', 'B'], [1, -0.5], base='C', lam=0.7),
        merge_config('ties', ['A', 'B'], base='C', density=0.2),
        merge_config('dare_linear', ['A'], base='C', density=0.1, seed=9),
        merge_config('dare_ties', ['A', 'B'], [0.5, 0.5], base='C', density=0.1),
    ],
    ids=lambda r: r.method,
)
def test_yaml_there_and_back(r): assert from_yaml(to_yaml(r)) == r


def test_slerp_runs_from_its_base_however_it_is_written(tmp_path, pair):
    a, b = pair
    recipe = f'merge_method: slerp, base_model: {b}, models: [{{model: {a}}}, {{model: {b}/}}], parameters: {{t: 0}}'
    got, B = read(merge(from_yaml(f'{{{recipe}}}'), tmp_path/'out')), read(b)
    assert all(torch.equal(got[n], B[n]) for n in B)


def test_recipe_and_options_do_not_mix(tmp_path, capsys):
    (tmp_path/'c.yml').write_text(
        '{merge_method: linear, models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]}'
    )
    for words, heard in (
        (['--method', 'slerp'], 'expected one of them'),
        (['--normalize'], 'expected one of them'),
        ([], 'no folder A'),
    ):
        code, _, err = said(capsys, 'merge', *words, tmp_path/'c.yml', tmp_path/'out')
        assert code == 2 and heard in err, err


# ---- looking

def test_compare_prints_and_returns(tmp_path, pair, capsys, llamas):
    base, one, two = llamas
    code, out, _ = said(capsys, 'compare', one, two, '--base', base)
    assert code == 0 and 'outside' in out and 'angle_change_deg' in out
    code, out, _ = said(capsys, 'compare', one, two, '--tensors')
    rows = compare(one, two)
    assert code == 0 and all(n in out for n in rows.tensor) and set(rows.tensor) == set(read(one))
    whole = together(compare(one, two, base=base), None).iloc[0]
    a, b, c = (torch.cat([read(p)[n].double().flatten() for n in sorted(read(p))]) for p in (one, two, base))
    assert whole.distance == pytest.approx((a-b).norm().item())
    assert whole.cosine_change == pytest.approx(((a-c)@(b-c)/(a-c).norm()/(b-c).norm()).item())
    code, _, err = said(capsys, 'compare', one, pair[0])
    assert code == 2 and 'expected one architecture' in err


# ---- adapters and export

def merge_any(r, out: Path) -> Path:
    "As the command line chooses."
    return merge_adapters(r, out) if are_adapters(r) else merge(r, out)


def test_adapters_of_one_base(tmp_path, llamas):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from solar_repro.models.adapters import save_adapter
    base, g = llamas[0], torch.Generator().manual_seed(0)

    def adapter(name, r, module='up_proj', n_in=64):
        name_of = 'base_model.model.model.layers.{}.mlp.{}.lora_{}.weight'.format
        shapes = dict(A=(r, n_in), B=(128, r))
        t = {name_of(i, module, x): torch.randn(s, generator=g)/8 for i in range(2) for x, s in shapes.items()}
        return save_adapter(t, r, 16, tmp_path/name)
    one, two = adapter('one', 4), adapter('two', 8)
    fresh = lambda: AutoModelForCausalLM.from_pretrained(base)
    load = lambda a: PeftModel.from_pretrained(fresh(), a).merge_and_unload().state_dict()
    start, x, y = fresh().state_dict(), load(one), load(two)
    got = load(merge_any(merge_config('linear', [one, two], [.3, .7]), tmp_path/'mean'))
    summed = load(merge_any(merge_config('task_arithmetic', [one, two], [1, -.5], base=base, lam=2), tmp_path/'sum'))
    changed = [n for n in x if not torch.equal(x[n], y[n])]
    assert len(changed) == 2
    for n in x:
        assert torch.allclose(got[n], .3*x[n]+.7*y[n], atol=1e-6), n
        assert torch.allclose(summed[n], start[n]+2*(x[n]-start[n])-(y[n]-start[n]), atol=1e-5), n
    for r, heard in (
        (merge_config('slerp', [one, two]), 'only ones whose result is an adapter'),
        (merge_config('linear', [one, adapter('gate', 4, 'gate_proj')]), 'is absent in'),
        (merge_config('linear', [one, two], [0.5, 0.6]), 'sum to 1.1'),
        (merge_config('linear', [one, base]), 'expected one kind'),
    ):
        with pytest.raises(ValueError, match=heard): merge_any(r, tmp_path/'refused')


def test_export_loads_in_one_line(tmp_path, full, capsys):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from solar_repro.models.adapters import materialize
    from solar_repro.pipeline.experiment import Experiment
    common = ['--profile', 'smoke', '--store', full]
    exp, ids = Experiment('smoke', store=full), torch.arange(40)[None]
    logits = lambda m: m.eval()(input_ids=ids).logits.detach()
    for name in ('Merge v1', 'Merge v4'):
        want, out = logits(materialize(exp.model(name))), tmp_path/name
        assert said(capsys, 'export', name, out, *common)[0] == 0
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, dtype='auto')), want)
        assert len(AutoTokenizer.from_pretrained(out)) and name in (out/'README.md').read_text()
    code, _, err = said(capsys, 'export', 'Merge v4', tmp_path/'slerp', '--adapter', *common)
    assert code == 2 and 'Leave out --adapter' in err
    assert said(capsys, 'export', 'Merge v1', tmp_path/'adapter', '--adapter', *common)[0] == 0
    got = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter'))
    want = logits(materialize(exp.model('Merge v1')))
    assert torch.allclose(got, want, atol=1e-4)      # float32 in another order
    assert not torch.allclose(want, logits(materialize(exp.model('base'))), atol=1e-4)
    assert said(capsys, 'export', 'Merge v1', tmp_path/'adapter', *common)[0] == 2
