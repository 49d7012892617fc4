"""Processes of their own that need not load torch first: forked from one that has loaded the libraries and did no more.

What `subprocess.Popen([python, '-c', code])` is, with its own environment, folder and fate, ten seconds sooner.
The package itself is loaded anew, from wherever PYTHONPATH says.
"""
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile

fork = multiprocessing.get_context('forkserver')
fork.set_forkserver_preload(['trl.trainer.sft_trainer', 'trl.trainer.dpo_trainer', 'matplotlib.pyplot',
                             'solar_repro.dpo', 'solar_repro.pipeline.builder', 'solar_repro.reports.notebooks'])

# Before other code: the training of SFT v1 tells of its first step, in a log too, and holds until it is interrupted.
HELD = '''
import signal
from solar_repro.pipeline.progress import Progress
say = Progress.on_progress
def held(self, name, done, total):
    self.shown = self.logged = 0.
    say(self, name, done, total)
    if (name, done) == ('SFT v1', 1): signal.pause()
Progress.on_progress = held
'''


def _run(code: str, args: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    "In the new process: be what `python -c` is."
    os.setsid()
    for k, name in enumerate(files, 1): os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), k)
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.path[:0] = ['-c', *args], ['', *filter(None, env.get('PYTHONPATH', '').split(os.pathsep))]
    for m in [m for m in sys.modules if m.partition('.')[0] == 'solar_repro']: del sys.modules[m]
    try: exec(compile(code, '<string>', 'exec'), dict(__name__='__main__'))
    finally: sys.stdout.flush()


class Forked:
    "A process that runs Python code; what it says is kept in files, and read at any time."

    def __init__(self, code: str, *args, env: dict | None = None, cwd=None):
        self.said = [tempfile.NamedTemporaryFile(prefix='forked-') for _ in range(2)]
        words, env = [str(a) for a in args], dict(os.environ, **(env or {}))
        target = code, words, env, str(cwd or os.getcwd()), [f.name for f in self.said]
        self.process = fork.Process(target=_run, args=target)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None: return self.process.exitcode

    def poll(self) -> int | None: return self.process.exitcode

    def send_signal(self, how: int) -> None:
        if self.poll() is None: os.kill(self.pid, how)

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    @property
    def out(self) -> str: return open(self.said[0].name, encoding='utf-8', errors='replace').read()

    @property
    def err(self) -> str: return open(self.said[1].name, encoding='utf-8', errors='replace').read()

    def communicate(self) -> tuple[str, str]:
        self.wait()
        return self.out, self.err


def forked(code: str, *args, **how) -> subprocess.CompletedProcess:
    "Run code in a process of its own, to its end."
    p = Forked(code, *args, **how)
    out, err = p.communicate()
    return subprocess.CompletedProcess(['-c', *args], p.returncode, out, err)
