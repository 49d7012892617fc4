"What several modules of tests use: this tree and its notebooks, processes on it, and damage to a file."
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL_NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
NOTEBOOKS = [p for p in ALL_NOTEBOOKS if not any(x.startswith(('.', '_')) for x in p.relative_to(ROOT).parts)]
ENV = {**os.environ, 'PYTHONPATH': str(ROOT)}              # this tree, whichever one the environment has installed


def run(*cmd, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in cmd], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True)


def python(*words, cwd=None) -> subprocess.CompletedProcess:
    "This Python on this tree, to an end without an error."
    done = run(sys.executable, *words, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def alive(pid: int) -> bool:
    "A process that has ended and was not waited for is none."
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError): return False


def flip(path: Path) -> None:
    "One bit in the middle of a file."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None: os.truncate(path, path.stat().st_size//2)
