"What every test stands on: no network, no display, and threads that do not fight over two cores."
import os
import signal
import socket
import subprocess
import sys

import pytest

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('MPLBACKEND', 'Agg')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "A test that reaches for another machine fails, and says so."
    connect = socket.socket.connect

    def only_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            raise RuntimeError(f'a test tried to connect to {address}; tests work offline')
        return connect(self, address)
    monkeypatch.setattr(socket.socket, 'connect', only_here)


# A job that a shell starts in the background ignores Ctrl-C, and so would everything it starts; the tests that press it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def full(tmp_path_factory):
    "A store with the whole recipe in it at smoke scale, built by a process of its own. Read only."
    store = tmp_path_factory.mktemp('run')/'store'
    code = f"from solar_repro.pipeline.experiment import Experiment; Experiment('smoke', store={str(store)!r}).run()"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return store
