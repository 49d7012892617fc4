"The store under kills, damage, full disks and two processes at once."
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from solar_repro.lab.store import Store

SLOW_BUILD = '''
import sys, time
from pathlib import Path
from solar_repro.lab.store import Store
store, seconds = Store(sys.argv[1]), float(sys.argv[2])
def fn(out):
    with open(sys.argv[1] + '.calls', 'a') as f: f.write('x')
    scratch = out/'scratch'; scratch.mkdir(exist_ok=True)
    print('checkpoint' if (scratch/'step').exists() else 'fresh', (out/'half').exists(), flush=True)
    (scratch/'step').write_text('7'); (out/'half').write_text('half')
    time.sleep(seconds); (out/'whole').write_text('whole')
a = store.build('data', store.key('data', 1, {}, {}), fn, settings={}, inputs={}, name='slow', epoch=1)
print(sorted(a.manifest['files']))
'''


def start(folder, seconds):
    return subprocess.Popen([sys.executable, '-c', SLOW_BUILD, str(folder), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def put(store, value, name='x', inputs={}, kind='data', epoch=1):
    settings = dict(value=value)
    return store.build(kind, store.key(kind, epoch, settings, inputs), lambda out: (out/'v').write_text(f'value {value}'),
                       settings=settings, inputs=inputs, name=name, epoch=epoch)


@pytest.fixture
def store(tmp_path): return Store(tmp_path/'store')


def test_a_killed_build_goes_on_from_its_scratch_alone(tmp_path):
    p = start(tmp_path/'s', 60)
    assert p.stdout.readline().split() == ['fresh', 'False']
    time.sleep(.3); p.send_signal(signal.SIGKILL); p.wait()
    store = Store(tmp_path/'s')
    assert store.find('data', store.key('data', 1, {}, {})) is None and store.entries() == []
    out, _ = start(tmp_path/'s', 0).communicate(timeout=60)
    assert out.splitlines() == ['checkpoint False', "['half', 'whole']"]       # scratch was kept, the half file was not, scratch is no payload


def test_a_second_process_waits_says_so_and_reuses(tmp_path):
    a = start(tmp_path/'s', 3)
    assert a.stdout.readline().split()[0] == 'fresh'
    b = start(tmp_path/'s', 3)
    out, err = b.communicate(timeout=60); a.wait(timeout=60)
    assert 'waiting' in err and out.splitlines() == ["['half', 'whole']"]      # b never ran the builder
    assert (tmp_path/'s.calls').read_text() == 'x'


def test_random_kills_leave_only_whole_artifacts(tmp_path):
    code = '''
import sys
from solar_repro.lab.store import Store
s = Store(sys.argv[1]); print('go', flush=True)
for i in range(10**6):
    s.build('data', s.key('data', 1, dict(i=i), {}), lambda out: [(out/str(k)).write_text(str(i)*1000) for k in range(3)], settings=dict(i=i), inputs={}, name=str(i), epoch=1)
'''
    rng, seen = random.Random(0), 0
    for _ in range(6):
        p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'s')], stdout=subprocess.PIPE, text=True)
        p.stdout.readline(); time.sleep(.1 + .3*rng.random()); p.kill(); p.wait()
        fresh = Store(tmp_path/'s')
        for a in fresh.entries():
            assert fresh.find(a.kind, a.key) is not None and set(a.manifest['files']) == {'0', '1', '2'}
            seen += 1
    assert seen > 10 and not (tmp_path/'s'/'damaged').exists()


@pytest.mark.parametrize('damage', ['flip', 'remove', 'add', 'manifest'])
def test_damage_is_noticed_set_aside_and_mended(store, capsys, damage):
    a = put(store, 1, name='SFT v9')
    victim = a.path/'v'
    if damage == 'flip': victim.write_bytes(b'V' + victim.read_bytes()[1:])
    if damage == 'remove': victim.unlink()
    if damage == 'add': (a.path/'more').write_text('x')
    if damage == 'manifest': (a.path/'manifest.json').write_text('{"key": ')
    fresh = Store(store.folder)
    assert fresh.find('data', a.key) is None
    assert 'damaged' in capsys.readouterr().err and len(list((store.folder/'damaged').iterdir())) == 1
    assert put(fresh, 1).content == a.content and (a.path/'v').read_text() == 'value 1'


def test_keys_follow_content_and_nothing_else(store):
    one, two = put(store, 1), put(store, 2)
    k = lambda **x: store.key(**(dict(kind='sft', epoch=1, settings=dict(a=1, b=[2]), inputs=dict(base=one)) | x))
    assert k() == k(settings=dict(b=[2], a=1)) == Store(store.folder.parent/'elsewhere').key('sft', 1, dict(a=1, b=[2]), dict(base=one))
    others = [k(kind='dpo'), k(epoch=2), k(settings=dict(a=1, b=[3])), k(inputs=dict(base=two)), k(inputs=dict(other=one)), k(inputs={})]
    assert len({k(), *others}) == 7
    assert put(store, 1, name='called otherwise').path == one.path


def test_full_disk_says_what_is_safe_and_publishes_nothing(store, monkeypatch):
    kept = put(store, 1)
    def full(out): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    key = store.key('data', 1, dict(value=2), {})
    with pytest.raises(OSError, match='disk is full.*Finished stages are kept'): store.build('data', key, full, settings={}, inputs={}, name='x', epoch=1)
    assert store.find('data', key) is None
    monkeypatch.setattr('solar_repro.lab.store.os.fsync', full)             # full while it is being published
    with pytest.raises(OSError, match='disk is full'): put(store, 2)
    monkeypatch.undo()
    assert [a.key for a in Store(store.folder).entries()] == [kept.key]
    assert put(Store(store.folder), 2).content


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='--store'): put(Store(tmp_path/'file'/'store'), 1)
    def read_only(*a, **k): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr('solar_repro.lab.store.Path.mkdir', read_only)
    with pytest.raises(OSError, match='cannot be written'): put(Store(tmp_path/'s'), 1)


def test_a_full_store_can_be_read_where_nothing_can_be_written(store, monkeypatch):
    a = put(store, 1)
    def read_only(*args, **kwargs): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr('solar_repro.lab.store.Path.mkdir', read_only)
    assert Store(store.folder).find('data', a.key).content == a.content


def test_other_folders_and_formats_are_refused(tmp_path):
    (tmp_path/'photos').mkdir(); (tmp_path/'photos'/'cat.jpg').write_text('')
    with pytest.raises(ValueError, match='no store.json'): Store(tmp_path/'photos')
    s = Store(tmp_path/'s'); put(s, 1)
    (tmp_path/'s'/'store.json').write_text(json.dumps(dict(format=2)))
    with pytest.raises(ValueError, match='format 2.*format 1'): Store(tmp_path/'s')


def test_open_refuses_other_content(store):
    a = put(store, 1)
    assert store.open('data', a.key, a.content).path == a.path
    with pytest.raises(FileNotFoundError, match='another one'): store.open('data', a.key, '0'*64)
    with pytest.raises(FileNotFoundError, match='missing'): store.open('data', '1'*64, a.content)


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_a_failing_builder_publishes_nothing(store, error):
    def fails(out): (out/'half').write_text('x'); raise error('no')
    with pytest.raises(error): store.build('data', '2'*64, fails, settings={}, inputs={}, name='x', epoch=1)
    assert store.find('data', '2'*64) is None and store.entries() == []
