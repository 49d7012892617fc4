"What every test stands on: no network, no display, and threads that do not fight over two cores."
import fcntl
import os
import shutil
import signal
import socket

import pytest
from chrome import PROGRAM, Chrome
from forked import forked

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('MPLBACKEND', 'Agg')


# The longest files, so that no worker is left with one at the end. The first two do not start with a store, so that
# one of them builds it (`full`) while the other goes on.
LONG = ['site', 'training', 'notebooks', 'pages', 'workers', 'run', 'campaign', 'plan', 'checkpoints', 'tiny', 'card',
        'a100_small', 'tables', 'package', 'verify', 'sources', 'eval', 'inference']


def pytest_collection_modifyitems(items):
    order = {f'test_{name}': k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "A test that reaches for another machine fails, and says so."
    connect = socket.socket.connect

    def only_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            raise RuntimeError(f'a test tried to connect to {address}; tests work offline')
        return connect(self, address)
    monkeypatch.setattr(socket.socket, 'connect', only_here)


# A job that a shell starts in the background ignores Ctrl-C, as would all that it starts; tests that press it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


BUILD = """
import shutil, sys
from solar_repro.pipeline.experiment import Experiment
exp = Experiment('smoke', store=sys.argv[1])
ours = {a.path for n in exp.graph if (a := exp.find(n))}
for a in exp.store.entries():
    if a.path not in ours: shutil.rmtree(a.path)     # the notebooks made more than the graph of the profile
exp.run()
"""


@pytest.fixture(scope='session')
def full(tmp_path_factory):
    """A store with all stages of the smoke profile, and no others, built by a process of its own. Read only.

    One for all workers: the first to come builds it, from what the notebooks left where `make test` ran them before
    (SMOKE_STORE).
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base
    store, done, made = folder/'full'/'store', folder/'full'/'done', os.environ.get('SMOKE_STORE')
    store.parent.mkdir(exist_ok=True)
    with open(store.parent/'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            if made and os.path.isdir(made) and not store.exists(): shutil.copytree(made, store)
            built = forked(BUILD, store)
            assert built.returncode == 0, built.stderr
            done.touch()
    return store


@pytest.fixture(scope='session')
def chrome():
    if not PROGRAM:
        pytest.skip('no chromium on this machine; on Debian: apt-get install chromium')
    pytest.importorskip('websocket', reason='websocket-client speaks to chromium; JupyterLab brings it')
    c = Chrome()
    yield c
    c.close()
