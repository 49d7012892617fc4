"""No other machine is looked for under an offline profile: by a run, a merge, an export, or any command.

In a process whose every connection and look-up of a name is refused and written down, whatever then becomes of the
error. The session's store lacks one stage of each kind but the base, so a run of the whole profile builds some of each.
"""
import os
import shutil
from pathlib import Path

import pytest
from forked import forked

from solar_repro.core.store import Store

ROOT = Path(__file__).resolve().parents[1]
GUARD = '''
import ipaddress, os, socket, sys, traceback
from huggingface_hub import constants
import datasets
constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False      # as where nobody has said that there is no net
constants.HF_HUB_DISABLE_TELEMETRY = False
WATCHED = 'socket.connect', 'socket.sendto', 'socket.sendmsg', 'socket.getaddrinfo', 'socket.gethostbyname', \
    'socket.gethostbyaddr', 'socket.getnameinfo'
asked = []

def is_here(event, args):
    if event in ('socket.connect', 'socket.sendto', 'socket.sendmsg'):
        if args[0].family not in (socket.AF_INET, socket.AF_INET6): return True
        args = args[1] or ('127.0.0.1',)                               # no address: that of the connection
    host = args[0][0] if isinstance(args[0], tuple) else args[0]
    host = host.decode() if isinstance(host, bytes) else host
    return host in (None, '', 'localhost') or host.split('%')[0] in ('127.0.0.1', '::1')

def hear(event, args):
    if event not in WATCHED or is_here(event, args): return
    asked.append(f'{event} {args}\\n' + ''.join(traceback.format_stack()[-6:-1]))
    raise OSError('no network in this test')
sys.addaudithook(hear)
'''
COMMANDS = '''
from solar_repro.reports.cli import main
here = ['--profile', 'smoke', '--store', 'store']
def do(*words):
    assert main([*words, *([] if words[0] in ('merge', 'compare') else here)]) == 0, words
do('run', '--workers', '1')
for words in (['status'], ['show', 'DPO v2'], ['show', 'SFT v1', 'gsm8k'], ['table', '5'], ['plan'], ['doctor'],
              ['verify'], ['contamination'], ['diff', 'DPO v1', 'DPO v2', '--task', 'gsm8k'], ['results', 'results'],
              ['export', 'SFT v1', 'A'], ['export', 'DPO v1', 'B'], ['export', 'DPO v1', 'P', '--adapter'],
              ['merge', '--method', 'slerp', 'A', 'B', 'out'], ['compare', 'A', 'B']): do(*words)
print('asked:', len(asked), *asked)
'''


def without_one_of_each_kind(full, store):
    "Make a copy of a store; say which stages it lacks."
    shutil.copytree(full, store, copy_function=os.link)
    lacks = {a.kind: a for a in Store(store).entries() if a.kind != 'base'}    # on another, all would be built anew
    for a in lacks.values(): shutil.rmtree(a.path)
    return sorted(a.manifest['name'] for a in lacks.values())


@pytest.mark.slow
def test_no_other_machine_is_looked_for(full, tmp_path):
    lacks = without_one_of_each_kind(full, tmp_path/'store')
    done = forked(GUARD + COMMANDS, env=dict(PYTHONPATH=str(ROOT)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'asked: 0', done.stdout[-5000:]
    assert set(lacks) <= {a.manifest['name'] for a in Store(tmp_path/'store').entries()} and len(lacks) > 8
    assert not (tmp_path/'store'/'damaged').exists()


def test_the_guard_hears_connections_and_names():
    done = forked(GUARD + '''
import http.client, threading
def look(do):
    try: do()
    except OSError as e: print(e)
look(lambda: socket.create_connection(('192.0.2.1', 80), 1))
look(lambda: http.client.HTTPConnection('a.invalid').request('GET', '/'))
look(lambda: socket.gethostbyname('a.invalid'))
look(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53)))
socket.getaddrinfo('localhost', 80)
print('asked:', len(asked))
''')
    assert done.stdout.splitlines() == ['no network in this test']*4 + ['asked: 4'], done.stdout + done.stderr
