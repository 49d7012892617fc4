"""Faults by the hundred: kills, damage, full disks, several runners at once; prints a table of what they did.

    python tests/campaign.py            250 kills, every kind of file, a disk full at 20 points, bad inputs (an hour)
    python tests/campaign.py --short    a few of each (a minute); what `make test` runs

Each try forks from this process, which has loaded the libraries and computes nothing itself; a fault strikes; then the
same command runs again, undisturbed. What counts: it ends (not stuck), in the result that it has without a fault (not
wrong), and neither of the two prints a traceback.
"""
import argparse
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from waiting import HOUR

import solar_repro.inference.lm as inference
import solar_repro.merging.engine  # noqa: F401  loaded before the first fork, as is all below
import solar_repro.merging.export  # noqa: F401
import solar_repro.models.training as training
import solar_repro.pipeline.builder  # noqa: F401
from solar_repro.core.files import content_hash, folder_files
from solar_repro.core.store import read_manifest
from solar_repro.reports.cli import main

LIMIT_S = HOUR # a command that takes longer hangs; without a fault each takes seconds


@dataclass
class Outcome:
    "How a command ended."
    status: int # exit status; less than 0: the signal that killed it
    said: str
    n_ops: int # operations on files that change something


def forked(argv:list[str], folder:Path, hook:Callable|None=None, kill_after_s:float|None=None)->Outcome:
    "A command in a process of its own; the hook hears of every operation on files before it is done."
    said, ops = folder/'said.txt', folder/'ops.txt'
    ops.write_bytes(b'')
    pid = os.fork()
    if pid == 0:
        try: status = _in_child(argv, folder, said, ops, hook)
        except BaseException as e: # never back into the parent's code
            os.write(2, f'Traceback of the campaign: {e!r}'.encode())
            status = 99
        os._exit(status)
    status = _waited(pid, kill_after_s)
    return Outcome(status, said.read_text(errors='replace'), ops.stat().st_size)


def _waited(pid:int, kill_after_s:float|None)->int:
    began = time.monotonic()
    while True:
        done, how = os.waitpid(pid, os.WNOHANG)
        if done: return -os.WTERMSIG(how) if os.WIFSIGNALED(how) else os.WEXITSTATUS(how)
        took = time.monotonic() - began
        if took > LIMIT_S or kill_after_s is not None and took > kill_after_s: os.kill(pid, signal.SIGKILL)
        time.sleep(.01)


def _in_child(argv:list[str], folder:Path, said:Path, ops:Path, hook:Callable|None)->int:
    fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counter = os.open(ops, os.O_WRONLY | os.O_APPEND)
    for k in (1, 2): os.dup2(fd, k)
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', buffering=1, closefd=False)
    os.chdir(folder)
    training.SAVE_S = inference.KEEP_S = 0. # kept after every step, every batch
    n = 0

    def watch(event, args):
        nonlocal n
        if not _changes(event, args, folder): return
        os.write(counter, b'.')
        if hook: hook(n, event, args)
        n += 1
    sys.addaudithook(watch)
    status = main(argv)
    sys.stdout.flush()
    return status


def _changes(event:str, args:tuple, folder:Path)->bool:
    "Whether an audited event changes a file in the folder."
    if event == 'open':
        if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return False
    elif event not in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'os.link'): return False
    return not os.path.isabs(str(args[0])) or str(args[0]).startswith(str(folder))


def kill_at(k:int)->Callable:
    def hook(n, event, args):
        if n == k: os.kill(os.getpid(), signal.SIGKILL)
    return hook


def kill_when(event:str, part:str, times:int=1)->Callable: # part: of the path, or of the new name
    "Kill after an operation was done so many times on such a file."
    left = times + 1

    def hook(n, e, args):
        nonlocal left
        if left == 1: os.kill(os.getpid(), signal.SIGKILL)
        if e == event and any(part in str(a) for a in args[:2]): left -= 1
    return hook


def full_from(k:int)->Callable:
    "A disk that is full from an operation on: what exists can be renamed and removed, nothing new is written."
    def hook(n, event, args):
        if n >= k and event in ('open', 'os.mkdir'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
    return hook


# -- the commands

@dataclass
class Work:
    "A command, on a store that lacks what it makes."
    name: str
    argv: list[str]
    makes: str # a stage, or the folder OUT
    stopped: Callable|None = None # a kill that leaves something to go on from; None: late in the work


ON = ['--profile', 'smoke', '--store', 'store']
WORKS = [
    Work('training', ['show', 'SFT v1', '--yes', *ON], 'SFT v1', kill_when('os.rename', '/complete', 2)),
    Work('evaluation', ['show', 'eval/SFT v1/arc', '--yes', *ON], 'eval/SFT v1/arc', kill_when('open', '/answers-')),
    Work('SLERP', ['show', 'Merge v4', '--yes', *ON], 'Merge v4'),
    Work('merge', ['merge', '--method', 'linear', '--weights', '0.4,0.6', 'a', 'b', 'OUT', '--shard-size', '0.0005'],
         'OUT', kill_when('os.rename', '.part')),
    Work('export', ['export', 'Merge v1', 'OUT', *ON], 'OUT'),
]


def linked(a:Path, b:Path)->Path:
    "A copy in no time: files here are replaced, never changed in place."
    return shutil.copytree(a, b, copy_function=os.link)


def artifacts(store:Path)->dict[str,Path]: # stage -> folder
    found = [p.parent for p in store.glob('*/*/manifest.json') if p.parts[-3] != 'damaged']     # set aside, not in use
    return {m['name']: p for p in found if (m := read_manifest(p))}


def result(w:Work, folder:Path)->str|None: # hash of what the work makes; None: nothing is there
    if w.makes != 'OUT': return _content(folder/'store', w.makes)
    return content_hash(folder_files(folder/'OUT')) if (folder/'OUT').is_dir() else None


def _content(store:Path, stage:str)->str|None:
    path = artifacts(store).get(stage)
    return content_hash(folder_files(path, 'manifest.json')) if path else None


def left_over(folder:Path)->list[str]:
    "Private folders that nobody needs any more."
    return [str(p.relative_to(folder)) for p in [*folder.glob('.OUT*'), *(folder/'store'/'building').glob('*')]]


class Campaign:
    "Tries, and what came of them."
    def __init__(self, full:Path, tmp:Path):
        self.full, self.tmp, self.n, self.tries, self.wrong = full, tmp, 0, Counter(), []
        self.right, self.n_ops, self.seconds = {}, {}, {}

    def fresh(self, w:Work)->Path:
        "A folder in which the work is still to do."
        folder = self.tmp/str(self.n)
        self.n += 1
        folder.mkdir()
        linked(self.full/'store', folder/'store')
        if w.name == 'merge':
            for m in 'ab': linked(self.full/m, folder/m)
        if w.makes != 'OUT': shutil.rmtree(artifacts(folder/'store')[w.makes])
        return folder

    def prepare(self)->None:
        "What each work makes without a fault, in how many operations and seconds."
        for w in WORKS:
            folder, began = self.fresh(w), time.monotonic()
            done = forked(w.argv, folder)
            assert done.status == 0, done.said
            self.right[w.name], self.n_ops[w.name] = result(w, folder), done.n_ops
            self.seconds[w.name] = time.monotonic() - began
            if w.makes != 'OUT': assert self.right[w.name] == _content(self.full/'store', w.makes)
            shutil.rmtree(folder)

    def judge(self, fault:str, w:Work, folder:Path, *before:Outcome, argv:list[str]|None=None)->None:
        "Run once more, undisturbed; count what was wrong. Who comes when OUT is there is told so, as ever."
        there = w.makes == 'OUT' and (folder/'OUT').is_dir()
        again = forked(argv or w.argv, folder)
        faults = []
        if again.status != (2 if there else 0): faults.append('stuck')
        elif result(w, folder) != self.right[w.name]: faults.append('wrong')
        if any('Traceback' in o.said for o in (*before, again)): faults.append('traceback')
        if left_over(folder): faults.append('left over')
        self.tries[fault, w.name] += 1
        for x in faults: self.wrong.append((fault, w.name, x, ' '.join(o.said[-300:] for o in (*before, again))))
        if not faults: shutil.rmtree(folder)

    def table(self)->pd.DataFrame:
        "Tries and faults, a row a kind."
        kinds = 'stuck', 'wrong', 'traceback', 'left over'
        bad = Counter((f, w, x) for f, w, x, _ in self.wrong)
        rows = [(f, w, n, *(bad[f, w, k] for k in kinds)) for (f, w), n in self.tries.items()]
        return pd.DataFrame(rows, columns=['fault', 'in', 'tries', *kinds])


# -- the faults

def kills(c:Campaign, n:int, rng:random.Random)->None:
    "So many kills at operations on files, and a quarter as many at moments; every third work is killed twice."
    for i in range(n + n//4):
        w = WORKS[i % len(WORKS)]
        folder, struck = c.fresh(w), []
        for _ in range(2 if i % 3 == 0 else 1):
            at = dict(hook=kill_at(rng.randrange(c.n_ops[w.name]))) if i < n else \
                dict(kill_after_s=rng.uniform(0, c.seconds[w.name]))
            struck.append(forked(w.argv, folder, **at))
        c.judge('kill at an operation' if i < n else 'kill at a moment', w, folder, *struck)


def full_disks(c:Campaign, n:int, rng:random.Random)->None:
    for i in range(n):
        w = WORKS[i % len(WORKS)]
        folder = c.fresh(w)
        struck = forked(w.argv, folder, full_from(rng.randrange(c.n_ops[w.name])))
        if struck.status not in (0, 2): struck.said += f'Traceback: exit {struck.status}'
        c.judge('full disk', w, folder, struck)


def flip(path:Path, rng:random.Random)->None:
    data = bytearray(path.read_bytes())
    if data: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _replace(path, bytes(data))


def cut(path:Path, rng:random.Random)->None: _replace(path, path.read_bytes()[:path.stat().st_size//2])


def gone(path:Path, rng:random.Random)->None: path.unlink()


def _replace(path:Path, data:bytes)->None: # not in place: other folders hold links to the file
    path.unlink()
    path.write_bytes(data)


DAMAGES = flip, cut, gone


def damaged_scratch(c:Campaign, works:list[Work], n:int|None, rng:random.Random)->None: # n: files of each; None: all
    "Every file that a killed command leaves to go on from."
    for w in works:
        stopped = c.fresh(w)
        struck = forked(w.argv, stopped, w.stopped or kill_at(c.n_ops[w.name]*2//3))
        assert struck.status == -signal.SIGKILL, f'{w.name} was not stopped: {struck}'
        private = [*stopped.glob('.OUT*'), *(stopped/'store'/'building').glob('*')]
        files = sorted(p.relative_to(stopped) for d in private for p in d.rglob('*') if p.is_file())
        for k, file in enumerate(files if n is None else rng.sample(files, min(n, len(files)))):
            for damage in DAMAGES if n is None else [DAMAGES[k % 3]]:
                folder = shutil.copytree(stopped, c.tmp/f'{w.name}-{file.name}-{damage.__name__}')
                damage(folder/file, rng)
                c.judge(f'{damage.__name__} in what a kill left', w, folder, struck)
        shutil.rmtree(stopped)


def damaged_store(c:Campaign, n:int|None, rng:random.Random)->None:
    "Every kind of file of every kind of stage."
    kinds = {}
    for name, path in sorted(artifacts(c.full/'store').items()):
        for f in sorted(p.relative_to(path) for p in path.rglob('*') if p.is_file()):
            kinds.setdefault((path.parent.name, str(f)), (name, path.relative_to(c.full)/f))
    chosen = list(kinds.items()) if n is None else rng.sample(list(kinds.items()), n)
    for k, ((kind, _), (name, file)) in enumerate(chosen):
        w = Work(f'store: {kind}', ['show', name, '--yes', *ON], name)
        c.right[w.name] = _content(c.full/'store', name)
        for damage in DAMAGES if n is None else [DAMAGES[k % 3]]:
            folder = c.tmp/str(c.n)
            c.n += 1
            folder.mkdir()
            linked(c.full/'store', folder/'store')
            damage(folder/file, rng)
            c.judge(damage.__name__, w, folder)


def runners(c:Campaign, works:list[Work], n:int)->None:
    "So many of each at once, on one store or one folder to make."
    for w in works:
        folder = c.fresh(w)
        for k in range(n): (folder/f'runner{k}').mkdir()
        pids = []
        for k in range(n):
            pid = os.fork()
            if pid == 0:
                done = _in_child(w.argv, folder, folder/f'runner{k}'/'said.txt', Path(os.devnull), None)
                os._exit(done)
            pids.append(pid)
        status = [_waited(pid, None) for pid in pids]
        said = ' '.join((folder/f'runner{k}'/'said.txt').read_text(errors='replace') for k in range(n))
        allowed = (0, 2) if w.makes == 'OUT' else (0,)     # who comes late to OUT is told that it is there
        if 0 not in status or not set(status) <= set(allowed): said += f'Traceback: exit {status}'
        if w.makes == 'OUT':
            made = result(w, folder)
            shutil.rmtree(folder/'OUT')
            if made != c.right[w.name]: c.wrong.append((f'{n} runners', w.name, 'wrong', said[-300:]))
        c.judge(f'{n} runners', w, folder, Outcome(0, said, 0))


def bad_inputs(c:Campaign)->None:
    "Those of test_bad_inputs.py, each refused in one line."
    file = Path(__file__).with_name('test_bad_inputs.py')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', file], capture_output=True,
                          text=True)
    count = Counter({how: int(n) for n, how in re.findall(r'(\d+) (passed|failed|error)', done.stdout)})
    c.tries['bad input', 'refused in a line'] = count.total()
    for _ in range(count.total() - count['passed'] or int(count.total() < 100)):
        c.wrong.append(('bad input', 'refused in a line', 'wrong', done.stdout[-3000:]))


# -- together

BUILD = [['run', '--workers', '1', *ON], ['export', 'Cand. 1', 'a', *ON], ['export', 'Cand. 2', 'b', *ON]]


def whole_store(store:Path|None, tmp:Path)->Path:
    "A folder with a store of all of smoke, copied or built, and two checkpoints of it."
    full = tmp/'full'
    full.mkdir()
    if store: shutil.copytree(store, full/'store')
    for argv in BUILD[bool(store):]:
        done = forked(argv, full)
        assert done.status == 0, done.said
    return full


def campaign(store:Path|None, short:bool, seed:int)->int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix='campaign-') as d:
        c = Campaign(whole_store(store, Path(d).resolve()), Path(d).resolve())
        c.prepare()
        parts = dict(
            kills=lambda: kills(c, 5 if short else 200, rng),
            full_disks=lambda: full_disks(c, 2 if short else 20, rng),
            damaged_scratch=lambda: damaged_scratch(c, WORKS[:1] if short else WORKS, 1 if short else None, rng),
            damaged_store=lambda: damaged_store(c, 2 if short else None, rng),
            runners=lambda: runners(c, WORKS[3:4] if short else WORKS, 4),
            bad_inputs=lambda: short or bad_inputs(c),
        )
        for name, tried in parts.items():
            tried()
            print(f'{name}: {sum(c.tries.values())} tries so far, {len(c.wrong)} faults', file=sys.stderr, flush=True)
        print(c.table().to_string(index=False))
    for fault, work, what, said in c.wrong: print(f'\n{what}: {fault}, {work} (seed {seed})\n{said}')
    print(f'{sum(c.tries.values())} tries, {len(c.wrong)} faults')
    return int(bool(c.wrong))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--store', type=Path, help='a store of all of smoke (default: build one)')
    p.add_argument('--short', action='store_true')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    sys.exit(campaign(a.store and a.store.resolve(), a.short, a.seed))
