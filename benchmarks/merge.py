"""Our streaming merge against mergekit 0.1.5 and against a plain copy of the inputs: time, memory and errors.

    python benchmarks/merge.py [--scale full|small] [--rounds 4] [--folder DIR]
                               [--mergekit_env DIR] [--without_mergekit] [--out NAME]

Two bfloat16 checkpoints of the Llama shape SHAPES[scale] (full: 1.1 B parameters, 2.2 GB each in 5 files) with random
weights, the second the first plus a change of a fifth of its size, so that the angle between matrices is about 11
degrees and SLERP is SLERP. mergekit lives in an environment of its own, made in the temporary folder with
`torch==2.13.0+cpu` (or, where pip finds no build of that name, `torch==2.13.0`), or reused if given.

Every job is a process of its own, timed from its start until its outputs are on the disk: `cp` of both inputs, then
fsync of every file; `solar-repro merge`, which hashes the inputs, syncs and renames by itself; `mergekit-yaml` as it
comes and with `--async-write --out-shard-size 500M`, then fsync. In odd rounds (cold) the inputs are dropped from the
system's cache first, in even ones (warm) they have been read; the order of jobs turns round. Before the first round
both inputs are copied once without a clock: a virtual machine gets its memory when it first uses it, and whoever comes
first would pay for that. Ratios are within a round. Memory: the private (anonymous) pages of the process and its
children, sampled every 20 ms.

Errors are counted over every element against the same formula in float64. An element is off if another bfloat16
number is nearer to the unrounded float64 value, and one side is farther than the other if its number is; by less than
SURE times the summands nobody is, since float64 itself is not known better: in the middle between two numbers either
is right.
"""
import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kept import keep

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
ROOT = Path(__file__).resolve().parents[1]
SHAPES = dict(
    full=dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
              num_key_value_heads=4, vocab_size=32000),
    small=dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
               num_key_value_heads=4, vocab_size=8000))
WEIGHTS, T = (.4, .6), .4
PIECE = 1 << 22   # elements at a time
SURE = 2**-44   # a float64 sum of two, with coefficients that come from sums over a tensor


def shapes(c: dict) -> dict[str, tuple]:
    h, i, vocab = c['hidden_size'], c['intermediate_size'], c['vocab_size']
    kv = h//c['num_attention_heads']*c['num_key_value_heads']
    layer = {
        'self_attn.q_proj': (h, h), 'self_attn.k_proj': (kv, h),
        'self_attn.v_proj': (kv, h), 'self_attn.o_proj': (h, h),
        'mlp.gate_proj': (i, h), 'mlp.up_proj': (i, h), 'mlp.down_proj': (h, i),
        'input_layernorm': (h,), 'post_attention_layernorm': (h,)}
    out = {'model.embed_tokens.weight': (vocab, h), 'model.norm.weight': (h,), 'lm_head.weight': (vocab, h)}
    return out | {f'model.layers.{n}.{m}.weight': s for n in range(c['num_hidden_layers']) for m, s in layer.items()}


def make_pair(folder: Path, scale: str, n_files: int = 5) -> int:
    "Two checkpoints; the number of parameters of one."
    import torch
    from safetensors.torch import save_file
    torch.set_num_threads(os.cpu_count())
    c, g = SHAPES[scale], torch.Generator().manual_seed(0)
    names = sorted(shapes(c))
    where = {n: f'model-{i*n_files//len(names)+1:05}-of-{n_files:05}.safetensors' for i, n in enumerate(names)}
    total = 0
    for m in 'AB':
        (folder/m).mkdir()
        config = dict(c, architectures=['LlamaForCausalLM'], model_type='llama', dtype='bfloat16', rms_norm_eps=1e-5,
                      tie_word_embeddings=False)
        (folder/m/'config.json').write_text(json.dumps(config))
        (folder/m/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    for f in sorted(set(where.values())):
        a, b = {}, {}
        for n in (n for n in names if where[n] == f):
            s = shapes(c)[n]
            w = torch.randn(s, generator=g).mul_(.02) if len(s) > 1 else 1 + .01*torch.randn(s, generator=g)
            a[n], b[n] = w.bfloat16(), (w + torch.randn(s, generator=g).mul_(.004)).bfloat16()
            total += w.numel()
        for m, t in (('A', a), ('B', b)):
            save_file(t, folder/m/f, metadata=dict(format='pt'))
            sync(folder/m)
    return total


def make_mergekit(folder: Path) -> Path:
    "An environment with mergekit in it."
    subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
    for torch in ('torch==2.13.0+cpu', 'torch==2.13.0'):
        done = subprocess.run([str(folder/'bin'/'pip'), 'install', '-q', torch, 'mergekit==0.1.5'])
        if done.returncode == 0: return folder
    raise SystemExit('merge: pip found neither build of torch 2.13.0 with mergekit 0.1.5; expected one. '
                     'Make an environment by hand and give it with --mergekit_env.')


def sync(folder: Path) -> None:
    for p in [p for p in folder.rglob('*') if p.is_file()] + [folder]:
        fd = os.open(p, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def cached(folder: Path, keep: bool) -> None:
    "Read the weights of both inputs, or drop them from the cache."
    for p in folder.glob('[AB]/*.safetensors'):
        with open(p, 'rb') as f:
            if keep:
                while f.read(1 << 24): pass
            else: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous(pid: int) -> int:
    "Bytes of private memory of a process and its children."
    total = 0
    try:
        for line in Path(f'/proc/{pid}/status').read_text().splitlines():
            if line.startswith('RssAnon'): total += int(line.split()[1])*1024
        for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split(): total += anonymous(int(child))
    except (FileNotFoundError, ProcessLookupError): pass
    return total


def timed(command: list[str], out: Path, must_sync: bool, env: dict) -> dict:
    "Seconds until the outputs are on the disk, processor seconds and peak memory of a command."
    peak, over = [0], threading.Event()
    used = os.times()
    began = time.perf_counter()
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)

    def watch():
        while not over.wait(.02): peak[0] = max(peak[0], anonymous(p.pid))
    w = threading.Thread(target=watch)
    w.start()
    said = p.communicate()[0].decode(errors='replace')
    if p.returncode == 0 and must_sync: sync(out)
    seconds = time.perf_counter() - began
    over.set()
    w.join()
    if p.returncode: raise SystemExit(f'{command} failed:\n{said}')
    now = os.times()
    cpu_s = now.children_user + now.children_system - used.children_user - used.children_system
    return dict(seconds=round(seconds, 2), cpu_s=round(cpu_s, 2), peak_anon_gib=round(peak[0]/2**30, 3))


YAML = dict(linear='''merge_method: linear
models:
- model: {a}
  parameters: {{weight: {weights[0]}}}
- model: {b}
  parameters: {{weight: {weights[1]}}}
dtype: bfloat16
''', slerp='''merge_method: slerp
base_model: {a}
models:
- model: {a}
- model: {b}
parameters: {{t: {t}}}
dtype: bfloat16
''')


def yaml_of(folder: Path, method: str) -> Path:
    (folder/f'{method}.yml').write_text(YAML[method].format(a=folder/'A', b=folder/'B', weights=WEIGHTS, t=T))
    return folder/f'{method}.yml'


def jobs(folder: Path, mergekit: Path | None) -> dict[str, tuple[list[str], bool]]:
    "Command of each job (OUT stands for the folder to make), and whether we have to sync its outputs."
    shell = 'from solar_repro.reports.cli import main; raise SystemExit(main())'      # what `solar-repro` does
    ours = [sys.executable, '-c', shell, 'merge']
    a, b = str(folder/'A'), str(folder/'B')
    out = {'cp of both': (['cp', '-r', a, b, 'OUT'], True),
           'linear': ([*ours, '--method', 'linear', '--weights', *map(str, WEIGHTS), a, b, 'OUT'], False),
           'slerp': ([*ours, '--method', 'slerp', '--t', str(T), a, b, 'OUT'], False)}
    if mergekit:
        for m in ('linear', 'slerp'):
            program, config = mergekit/'bin'/'mergekit-yaml', yaml_of(folder, m)
            run = [str(program), str(config), 'OUT', '--no-copy-tokenizer', '--quiet']
            out[f'mergekit {m}'] = (run, True)
            out[f'mergekit {m}, async'] = ([*run, '--async-write', '--out-shard-size', '500M'], True)
    return out


def weights_of(folder: Path) -> dict:
    from safetensors import safe_open
    return {n: f for p in sorted(folder.glob('*.safetensors')) for f in [safe_open(p, 'pt')] for n in f.keys()}


def ulps(x, y):
    "Steps between bfloat16 numbers, as integers."
    import torch
    line = lambda v: torch.where((i := v.view(torch.int16).int()) < 0, -(i & 0x7fff), i)
    return (line(x) - line(y)).abs()


def nearest(x):
    "float64 rounded to bfloat16 once, ties to even, by its bits (torch goes by way of float32)."
    import torch
    v = x.view(torch.int64)
    return ((v + (1 << 44) - 1 + (v >> 45 & 1)) >> 45 << 45).view(torch.float64).bfloat16()


def errors_in(exact, sure, got: dict) -> dict:
    "Of a slice: for each side how many elements are off, by how much, and how many are farther than the other's."
    want, distance = nearest(exact), {w: (x.double() - exact).abs() for w, x in got.items()}
    best, found = (want.double() - exact).abs(), dict(elements=len(exact))
    for w, x in got.items():
        d = ulps(x, want)*(distance[w] > best + sure)
        found |= {f'{w} off': int((d > 0).sum()), f'{w} off by more than 1 ulp': int((d > 1).sum())}
        found[f'{w} max ulp'] = int(d.max())
    for w, other in (('ours', 'mergekit'), ('mergekit', 'ours')):
        if len(got) == 2: found[f'{w} farther'] = int((distance[w] > distance[other] + sure).sum())
    return found


def errors(folder: Path, method: str, mergekit: bool) -> dict:
    "Every element of the outputs against float64."
    import torch
    A, B = weights_of(folder/'A'), weights_of(folder/'B')
    who = {'ours': weights_of(folder/f'out {method}')}
    if mergekit: who['mergekit'] = weights_of(folder/f'out mergekit {method}')
    part = lambda model, n, lo, hi: model[n].get_tensor(n).flatten()[lo:hi]

    def one(n, lo, hi, ca, cb):
        a, b = part(A, n, lo, hi).double().mul_(ca), part(B, n, lo, hi).double().mul_(cb)
        return errors_in(a + b, (a.abs() + b.abs())*SURE, {w: part(t, n, lo, hi) for w, t in who.items()})
    count: dict = {}
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        work = []
        for n in A:
            x, y = A[n].get_tensor(n).flatten(), B[n].get_tensor(n).flatten()
            pair = WEIGHTS if method == 'linear' else coefficients(x, y)
            work += [pool.submit(one, n, lo, lo + PIECE, *pair) for lo in range(0, x.numel(), PIECE)]
        for w in work:
            for k, v in w.result().items():
                count[k] = max(count.get(k, 0), v) if k.endswith('max ulp') else count.get(k, 0) + v
    return count


def coefficients(a, b) -> tuple[float, float]:
    "SLERP's formula in float64, with the fallback that both sides have."
    sums = [0., 0., 0.]
    for x, y in zip(a.split(PIECE), b.split(PIECE)):
        x, y = x.double(), y.double()
        for i, s in enumerate((x.dot(x), y.dot(y), x.dot(y))): sums[i] += s.item()
    c = max(-1., min(1., sums[2]/math.sqrt(sums[0])/math.sqrt(sums[1])))
    if abs(c) > .9995: return 1 - T, T
    theta = math.acos(c)
    return math.sin((1 - T)*theta)/math.sin(theta), math.sin(T*theta)/math.sin(theta)


def fixed(folder: Path, env: dict) -> dict:
    "Processor seconds of what no merge can do without: to hash both inputs (in the cache), and to import."
    cpu = 'import resource; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))'

    def seconds(code):
        command = [sys.executable, '-c', f'{code}\n{cpu}']
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    cached(folder, keep=True)
    files = [str(f) for f in sorted(folder.glob('[AB]/*.safetensors'))]
    load = 'from solar_repro.core.files import file_hash'
    hash_s = seconds(f'{load}\nfor f in {files}: file_hash(f)') - seconds(load)
    import_s = seconds('from solar_repro.merging import engine')
    return dict(hash_s=round(hash_s, 2), import_s=round(import_s, 2), cores=len(os.sched_getaffinity(0)))


def aims(r: dict) -> list[tuple[str, str, bool]]:
    "What was aimed at, what was measured, whether it was met in every round."
    ratios = lambda a, b: [x['jobs'][a]['seconds']/x['jobs'][b]['seconds'] for x in r['rounds']]
    span = lambda v: f'{min(v):.2f} to {max(v):.2f}'
    out = []
    for m, most in (('linear', .6), ('slerp', .8)):
        v = ratios(m, 'cp of both')
        out.append((f'{m}: at most {most} of the time that a copy of both inputs takes', span(v), max(v) <= most))
    if any(n.startswith('mergekit') for n in r['rounds'][0]['jobs']):
        for m in ('linear', 'slerp'):
            v = ratios(f'mergekit {m}', m)
            out.append((f'{m}: mergekit takes at least 3 times as long', span(v), min(v) >= 3))
        n = sum(e['ours farther'] for e in r['errors'].values())
        out.append(("no element farther from float64 than mergekit's", str(n), n == 0))
    ulp = max(e['ours max ulp'] for e in r['errors'].values())
    gib = max(x['jobs'][m]['peak_anon_gib'] for x in r['rounds'] for m in ('linear', 'slerp'))
    return out + [('at most 1 ulp off in any element', f'{ulp} ulp', ulp <= 1),
                  ('at most 1 GiB of private memory', f'{gib:.2f} GiB', gib <= 1)]


def row(r: dict, name: str) -> str:
    "A job's line of the table."
    mine, copies = ([x['jobs'][n] for x in r['rounds']] for n in (name, 'cp of both'))
    cells = [name, ', '.join(f"{x['seconds']:.1f}" for x in mine),
             ', '.join(f"{x['seconds']/c['seconds']:.2f}" for x, c in zip(mine, copies)),
             f"{max(x['cpu_s'] for x in mine):.1f}", f"{max(x['peak_anon_gib'] for x in mine):.2f}"]
    return '| ' + ' | '.join(cells) + ' |'


def what_binds(r: dict) -> str:
    "Why a merge cannot be faster here."
    copy, linear = ([x['jobs'][n] for x in r['rounds']] for n in ('cp of both', 'linear'))
    hash_s, import_s, cores = r['fixed']['hash_s'], r['fixed']['import_s'], r['fixed']['cores']
    least, most = min(x['seconds'] for x in copy), max(x['seconds'] for x in copy)
    cheapest = min(x['cpu_s'] for x in linear)
    return (f"The aims beside the copy were set where it took 8 to 15 s; here it takes {least:.1f} to {most:.1f} s. "
            f"What binds the merge is not the disk but the processors: of the {cheapest:.1f} processor seconds of the "
            f"cheapest linear merge {hash_s:.1f} are the SHA-256 of both inputs, without which the card could not say "
            f"what was merged, and {import_s:.1f} the import of torch. On {cores} cores these two alone take "
            f"{(hash_s + import_s)/cores:.1f} s, before anything is read to be mixed or written.")


def beside_mergekit(r: dict) -> list[str]:
    "Sentences on speed and on errors, where mergekit was run."
    lines = []
    for m, e in r['errors'].items():
        if f'mergekit {m}' not in r['rounds'][0]['jobs']: continue
        took = lambda name: [x['jobs'][name]['seconds']/x['jobs'][m]['seconds'] for x in r['rounds']]
        plain, other = took(f'mergekit {m}'), took(f'mergekit {m}, async')
        listed = lambda values: ', '.join(f'{v:.2f}' for v in values)
        lines += ['', f"{m}: mergekit takes {listed(plain)} times as long ({listed(map(min, plain, other))} in the "
                      "faster of its two ways).", '',
                  f"{m}: ours is farther from the float64 value than mergekit's in {e['ours farther']:,} elements and "
                  f"closer in {e['mergekit farther']:,}; mergekit's is off in {e['mergekit off']:,}, ours in "
                  f"{e['ours off']:,}."]
    return lines


def report(r: dict) -> str:
    "The results as a page."
    rounds, keys = ', '.join(x['cache'] for x in r['rounds']), next(iter(r['errors'].values()))
    return '\n'.join([
        '# Streaming merge, mergekit and a copy', '',
        f"{r['n_params']/1e9:.2f} B parameters each, bfloat16; {r['machine']}. Rounds: {rounds}. Made by "
        f"`python benchmarks/merge.py --scale {r['scale']} --rounds {len(r['rounds'])}`.", '',
        '| aim | measured, over the rounds | met |', '|---|---|---|',
        *(f"| {what} | {got} | {'yes' if met else '**no**'} |" for what, got, met in aims(r)), '',
        what_binds(r), '',
        '| job | seconds, by round | ratio to cp of the round | most processor seconds | peak anonymous GiB |',
        '|---|---|---|---|---|',
        *(row(r, n) for n in r['rounds'][0]['jobs']), '',
        '## Errors against float64', '',
        '| | ' + ' | '.join(r['errors']) + ' |', '|---|' + '---|'*len(r['errors']),
        *(f'| {k} | ' + ' | '.join(f'{e[k]:,}' for e in r['errors'].values()) + ' |' for k in keys),
        *beside_mergekit(r)]) + '\n'


def machine() -> str:
    info = Path('/proc/cpuinfo')
    avx = info.is_file() and 'avx512f' in info.read_text()
    memory = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30
    return (f"{len(os.sched_getaffinity(0))} {platform.machine()} cores{' with AVX-512' if avx else ''}, "
            f"{memory:.0f} GiB of memory, load {os.getloadavg()[0]:.1f} at the start")


def one_round(folder: Path, todo: list, warm: bool, env: dict) -> dict:
    "Every job once."
    said = {}
    for name, (command, must_sync) in todo:
        out = folder/f'out {name}'
        shutil.rmtree(out, ignore_errors=True)
        if name.startswith('cp'): out.mkdir()
        os.sync()
        cached(folder, keep=warm)
        said[name] = timed([str(out) if x == 'OUT' else x for x in command], out, must_sync, env)
        print(f'{name}: {said[name]}', flush=True)
    return said


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scale', choices=SHAPES, default='full')
    p.add_argument('--rounds', type=int, default=4)
    p.add_argument('--folder', type=Path, help='where the temporary folder is made')
    p.add_argument('--mergekit_env', type=Path, help='an environment with mergekit 0.1.5')
    p.add_argument('--without_mergekit', action='store_true')
    p.add_argument('--out', help='also write benchmarks/results/NAME.json and .md')
    a = p.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='merge-', dir=a.folder))
    try:
        r = dict(scale=a.scale, machine=machine(), rounds=[])
        mergekit = None if a.without_mergekit else a.mergekit_env or make_mergekit(folder/'mergekit-env')
        r['n_params'] = make_pair(folder, a.scale)
        todo = list(jobs(folder, mergekit).items())
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
        for m in 'AB': shutil.copytree(folder/m, folder/'once'/m)
        shutil.rmtree(folder/'once')
        for i in range(a.rounds):
            print(f'round {i+1}')
            turn = i % len(todo)
            said = one_round(folder, todo[turn:] + todo[:turn], bool(i % 2), env)
            r['rounds'].append(dict(cache='warm' if i % 2 else 'cold', jobs={n: said[n] for n, _ in todo}))
        r['fixed'] = fixed(folder, env)
        r['errors'] = {m: errors(folder, m, bool(mergekit)) for m in ('linear', 'slerp')}
        print(report(r))
        if a.out: keep(a.out, report(r), r)
    finally: shutil.rmtree(folder)


if __name__ == '__main__': main()
