"The store under kills, races, damage and full disks: what it shows is whole, or it is not there."
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from common import flip
from waiting import wait_for

import solar_repro.core.store as store_module
from solar_repro.core.store import read_manifest, Store

WORKER = '''
import sys, time
from pathlib import Path
from solar_repro.core.store import Store

def build(folder, n, fn):
    s = Store(folder)
    key = s.key('sft', 1, dict(n=n), {})
    return s.build('sft', key, fn, settings=dict(n=n), inputs={}, name=f'model {n}', code_version=1, seed=0)

'''


def start(code, *args):
    return subprocess.Popen([sys.executable, '-c', WORKER + code, *map(str, args)], stderr=subprocess.PIPE, text=True)


def build(s, fn=None, *, kind='sft', settings=None, inputs=None, code_version=1):
    settings, inputs = settings or dict(lr=.1), inputs or {}

    def payload(out):
        (out/'sub').mkdir()
        (out/'sub'/'weights.bin').write_bytes(bytes(range(256))*8)
        (out/'log.csv').write_text('step,loss\n1,2.5\n')
    key = s.key(kind, code_version, settings, inputs)
    facts = dict(settings=settings, inputs=inputs, name='model', code_version=code_version, seed=0)
    return s.build(kind, key, fn or payload, **facts)


def untouched(_): raise AssertionError('built again although it was there')


def visible(s):
    hidden = 'building', 'damaged', 'locks'
    return [p for p in s.folder.glob('*/*') if p.is_dir() and p.parent.name not in hidden]


# -- kills

def test_killed_build_goes_on_with_its_scratch_and_nothing_else(tmp_path):
    code = '''
def fn(out):
    (out/'scratch'/'checkpoint').mkdir(parents=True)
    (out/'scratch'/'checkpoint'/'state').write_text('step 7')
    (out/'adapter').mkdir(); (out/'adapter'/'half').write_bytes(b'half'); (out/'loose').write_bytes(b'half')
    Path(sys.argv[2]).touch(); time.sleep(10**6)
build(sys.argv[1], 1, fn)
'''
    folder, mark, seen = tmp_path/'store', tmp_path/'mark', []
    p = start(code, folder, mark); wait_for(mark.exists)
    s = Store(folder)
    assert not visible(s) and s.find('sft', s.key('sft', 1, dict(n=1), {})) is None
    p.send_signal(signal.SIGKILL); p.communicate()

    def resume(out):
        seen.extend(sorted(f.relative_to(out).as_posix() for f in out.rglob('*') if f.is_file()))
        (out/'weights').write_text((out/'scratch'/'checkpoint'/'state').read_text())
    a = build(s, resume, settings=dict(n=1))
    assert seen == ['scratch/checkpoint/state']
    assert sorted(f.name for f in a.path.iterdir()) == ['manifest.json', 'weights']
    assert (a.path/'weights').read_text() == 'step 7'
    assert not list((folder/'building').iterdir())


def test_an_error_in_the_builder_leaves_nothing_visible(tmp_path):
    s = Store(tmp_path/'store')

    def fails(out): (out/'half').touch(); raise ZeroDivisionError('in training')
    with pytest.raises(ZeroDivisionError, match='in training'): build(s, fails)
    assert not visible(s)
    with pytest.raises(RuntimeError, match='wrote nothing'): build(s, lambda out: None)
    assert not (build(s).path/'half').exists()


@pytest.mark.parametrize('moment', ['mkdir', 'write_text', 'fsync', 'rename'])
def test_killed_at_every_call_that_writes(tmp_path, moment):
    "The k-th call of a kind is the last one, for every k; every fresh process takes the store up again."
    code = '''
import os, signal
calls, last = 0, int(sys.argv[2])
owner, name = {'mkdir': (Path, 'mkdir'), 'write_text': (Path, 'write_text')}.get(sys.argv[3], (os, sys.argv[3]))
real = getattr(owner, name)
def counted(*args, **kwargs):
    global calls
    if calls == last: os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    return real(*args, **kwargs)
for store in sys.argv[1:2]:
    for k in range(100):
        pid = os.fork()
        if pid == 0:
            calls, last = 0, k
            setattr(owner, name, counted)
            build(f'{store}/{k}', 1, lambda out: (out/'weights').write_bytes(b'whole'))
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0: break
    print(k, file=sys.stderr)
'''
    p = start(code, tmp_path, 0, moment)
    err = p.communicate()[1]
    assert p.returncode == 0, err
    kills = int(err.split()[-1])
    assert kills >= 1
    for k in range(kills + 1):
        s = Store(tmp_path/str(k))
        for path in visible(s):
            assert s.find('sft', json.loads((path/'manifest.json').read_text())['key'])
        a = build(s, lambda out: (out/'weights').write_bytes(b'whole'), settings=dict(n=1))
        assert (a.path/'weights').read_bytes() == b'whole'
    assert not list(tmp_path.glob('*/damaged/*'))


def test_killed_at_random_moments_every_visible_artifact_verifies(tmp_path):
    code = '''
def fn(n):
    def write(out):
        for i in range(4): (out/f'part{i}').write_bytes(bytes([n % 256])*20000)
    return write
for n in range(int(sys.argv[2])): build(sys.argv[1], n, fn(n))
'''
    folder, draw, n = tmp_path/'store', random.Random(3), 150
    p = start(code, folder, n); wait_for(lambda: len(visible(Store(folder))) >= 2)
    for _ in range(12):
        time.sleep(draw.uniform(0, .05))
        p.send_signal(signal.SIGKILL); err = p.communicate()[1]
        assert 'Error' not in err and 'damaged' not in err
        before = len(visible(Store(folder)))
        p = start(code, folder, n)
        wait_for(lambda: p.poll() is not None or len(visible(Store(folder))) > before)
    p.send_signal(signal.SIGKILL); p.communicate()
    s, found = Store(folder), 0
    for path in visible(s):
        m = json.loads((path/'manifest.json').read_text())
        assert s.find('sft', m['key']).content == m['content']
        assert all((path/f'part{i}').read_bytes() == bytes([m['settings']['n'] % 256])*20000 for i in range(4))
        found += 1
    assert found >= 12 and not (folder/'damaged').exists()
    p = start(code, folder, n); assert 'Error' not in p.communicate()[1] and p.returncode == 0
    assert len(visible(Store(folder))) == n == len(Store(folder).entries()) and not list((folder/'building').iterdir())


# -- two at once

def test_the_second_process_waits_says_so_and_reuses(tmp_path):
    code = '''
def fn(out):
    with open(sys.argv[2], 'a') as f: f.write('built\\n')
    while not Path(sys.argv[3]).exists(): time.sleep(.01)
    (out/'weights').write_bytes(b'x'*1000)
print(build(sys.argv[1], 1, fn).content, file=sys.stderr)
'''
    log, go = tmp_path/'log', tmp_path/'go'
    first = start(code, tmp_path/'store', log, go); wait_for(log.exists, first)
    second = start(code, tmp_path/'store', log, go)
    said = second.stderr.readline()
    go.touch()
    e1, e2 = first.communicate()[1], said + second.communicate()[1]
    assert first.returncode == second.returncode == 0 and log.read_text() == 'built\n'
    assert 'model 1 is being built by another process; waiting' in e2 and 'waiting' not in e1
    assert e1.split()[-1] == e2.split()[-1]


def test_the_second_process_takes_over_from_a_killed_one(tmp_path):
    code = '''
def fn(out):
    (out/'scratch').mkdir(exist_ok=True)
    step = out/'scratch'/'step'
    (out/'weights').write_text('kept' if step.exists() else 'anew')
    if not step.exists(): step.touch(); Path(sys.argv[2]).touch(); time.sleep(10**6)
print((build(sys.argv[1], 1, fn).path/'weights').read_text(), file=sys.stderr)
'''
    mark = tmp_path/'mark'
    first = start(code, tmp_path/'store', mark); wait_for(mark.exists)
    second = start(code, tmp_path/'store', mark)
    assert 'waiting' in second.stderr.readline()
    first.send_signal(signal.SIGKILL); first.communicate()
    assert second.communicate()[1].split()[-1] == 'kept'


def test_many_processes_start_on_an_empty_folder(tmp_path):
    code = '''
for n in range(5): build(sys.argv[1], n, lambda out: (out/'weights').write_bytes(b'x'))
'''
    ps = [start(code, tmp_path/'store') for _ in range(6)]
    errs = [p.communicate()[1] for p in ps]
    assert [p.returncode for p in ps] == [0]*6, errs
    assert len(visible(Store(tmp_path/'store'))) == 5


def test_a_store_being_made_by_another_process_is_one(tmp_path):
    "Whatever part of a store's frame a kill, or another process on its way, has left."
    for i, left in enumerate((['locks'], ['locks', 'building'], ['building'], ['.store.1a2b.json'])):
        folder = tmp_path/str(i); folder.mkdir()
        for d in left: (folder/d).touch() if '.' in d else (folder/d).mkdir()
        assert build(Store(folder)).content


# -- damage

def without_content(path):
    m = json.loads((path/'manifest.json').read_text())
    del m['content']
    (path/'manifest.json').write_text(json.dumps(m))


def other_seed(path):
    file = path/'manifest.json'
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 8'))


DAMAGE = dict(
    flipped_bit=lambda p: flip(p/'sub'/'weights.bin'),
    cut_short=lambda p: os.truncate(p/'sub'/'weights.bin', 100),
    missing_file=lambda p: (p/'log.csv').unlink(),
    extra_file=lambda p: (p/'extra').touch(),
    renamed_file=lambda p: (p/'log.csv').rename(p/'log2.csv'),
    extra_inner_manifest=lambda p: (p/'sub'/'manifest.json').write_text('{}'),
    empty_manifest=lambda p: (p/'manifest.json').write_bytes(b''),
    half_manifest=lambda p: os.truncate(p/'manifest.json', 200),
    binary_manifest=lambda p: (p/'manifest.json').write_bytes(bytes(range(128, 256))),
    list_as_manifest=lambda p: (p/'manifest.json').write_text('[]'),
    other_manifest=lambda p: (p/'manifest.json').write_text('{"key": "x"}'),
    no_content=without_content,
    other_seed=other_seed,
    missing_manifest=lambda p: (p/'manifest.json').unlink(),
)


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_said_kept_aside_and_built_again(tmp_path, capsys, damage):
    good = build(Store(tmp_path))
    DAMAGE[damage](good.path)
    s = Store(tmp_path)
    assert s.find('sft', good.key) is None
    err = capsys.readouterr().err
    assert 'damaged' in err and 'set aside' in err
    aside, = (tmp_path/'damaged').iterdir()
    assert (aside/'sub'/'weights.bin').exists()
    again = build(s)
    assert again.content == good.content and again.path == good.path
    assert [a.key for a in s.entries()] == [good.key]
    assert build(Store(tmp_path), untouched).content == good.content and capsys.readouterr().err == ''


def flips(data, of):
    "The bytes with a bit flipped, at each place that `of` names."
    for i in of: yield data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i+1:]


def test_a_manifest_with_any_bit_flipped_says_nothing_else(tmp_path):
    "It reads as it was written (white space may differ) or not at all; and no listing takes it."
    a = build(Store(tmp_path))
    file, good, unread = a.path/'manifest.json', (a.path/'manifest.json').read_bytes(), 0
    for bad in flips(good, range(len(good))):
        file.write_bytes(bad)
        assert read_manifest(a.path) in ({}, a.manifest)
        unread += not read_manifest(a.path)
    assert unread > .7*len(good)
    file.write_bytes(good.replace(b'"model"', b'"modem"'))
    assert Store(tmp_path).entries() == [] and Store(tmp_path).find('sft', a.key) is None


def test_a_manifest_is_read_again_at_every_find(tmp_path, capsys):
    s = Store(tmp_path); a = build(s)
    other_seed(a.path)
    assert s.find('sft', a.key) is None and 'damaged' in capsys.readouterr().err


def test_a_manifest_without_its_hash_is_damage(tmp_path, capsys):
    a = build(Store(tmp_path))
    (a.path/'manifest.json').write_text(json.dumps({k: v for k, v in a.manifest.items() if k != 'sha256'}))
    assert Store(tmp_path).entries() == [] and Store(tmp_path).find('sft', a.key) is None
    assert 'damaged' in capsys.readouterr().err


@pytest.mark.parametrize('damage', [*range(0, 90, 7), 'cut', 'gone'])
def test_a_damaged_mark_is_named_with_what_mends_it(tmp_path, damage):
    a, mark = build(Store(tmp_path)), tmp_path/'store.json'
    good = mark.read_bytes()
    if damage == 'gone': mark.unlink()
    else: mark.write_bytes(good[:5] if damage == 'cut' else next(flips(good, [damage % len(good)])))
    with pytest.raises(ValueError, match=r'store.json.*write \{"format": 1\} into store.json.*--store'): Store(tmp_path)
    mark.write_text('{"format": 1}')
    s = Store(tmp_path)
    assert s.find('sft', a.key) == a and build(s, settings=dict(lr=.2))


def test_a_home_folder_is_found_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Store('~/x').folder == tmp_path/'x'
    with pytest.raises(ValueError, match='names no user'): Store('~nobody-of-this-name/x')
    assert not list(tmp_path.iterdir())


def test_a_damaged_manifest_does_not_hide_the_other_artifacts(tmp_path):
    s = Store(tmp_path); a, b = build(s), build(s, settings=dict(lr=.2))
    (a.path/'manifest.json').write_bytes(b'{')
    assert [x.key for x in s.entries()] == [b.key]


def test_another_files_under_the_right_name_are_damage(tmp_path, capsys):
    "An artifact copied under another key is whole, but not what the key asks for."
    s = Store(tmp_path); a, b = build(s), build(s, settings=dict(lr=.2), fn=lambda out: (out/'w').touch())
    for f in (b.path/'w', b.path/'manifest.json'): f.unlink()
    shutil.copytree(a.path, b.path, dirs_exist_ok=True)
    assert Store(tmp_path).find('sft', b.key) is None and 'damaged' in capsys.readouterr().err


def test_two_processes_find_the_same_damage(tmp_path, monkeypatch):
    "Another process moves it aside between our look and our move."
    a = build(Store(tmp_path)); flip(a.path/'sub'/'weights.bin')
    s, real = Store(tmp_path), store_module.folder_files

    def slow(path, but):
        found = real(path, but)
        if path == a.path: path.rename(tmp_path/'gone')
        return found
    monkeypatch.setattr(store_module, 'folder_files', slow)
    assert s.find('sft', a.key) is None


def test_open_names_what_is_missing(tmp_path):
    s = Store(tmp_path); a = build(s)
    assert s.open('sft', a.key, a.content) == a
    with pytest.raises(FileNotFoundError, match='missing.*Run again'): s.open('sft', '0'*64, a.content)
    with pytest.raises(FileNotFoundError, match='another one than recorded'): s.open('sft', a.key, '0'*64)


# -- places that cannot be written

def test_a_store_below_a_file(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='cannot be written .*--store or SOLAR_STORE'):
        build(Store(tmp_path/'file'/'store'))
    with pytest.raises(ValueError, match='is no folder; expected one.*--store or SOLAR_STORE'):
        Store(tmp_path/'file')


@pytest.mark.parametrize('code', [errno.EROFS, errno.EACCES, errno.EPERM])
def test_read_only_says_so_and_what_is_there_is_still_read(tmp_path, monkeypatch, code):
    a = build(Store(tmp_path))

    def refuse(*args, **kwargs): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(store_module.Path, 'mkdir', refuse); monkeypatch.setattr(os, 'rename', refuse)
    s = Store(tmp_path)
    assert s.find('sft', a.key) == a
    with pytest.raises(OSError, match=f'store {tmp_path}: cannot be written .*--store or SOLAR_STORE') as e:
        build(s, settings=dict(lr=.2))
    assert e.value.errno == code
    monkeypatch.undo()
    assert len(visible(s)) == 1


FULL = {'in the builder': OSError(errno.ENOSPC, 'No space left on device'),
        'in safetensors': RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)'),
        'in torch.save': RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534'),
        'in torch.save, at its end': RuntimeError('basic_ios::clear: iostream error')}


@pytest.mark.parametrize('where', FULL)
def test_full_disk_in_the_builder(tmp_path, where):
    s = Store(tmp_path); a = build(s)

    def fills(out): (out/'half').write_bytes(b'half'); raise FULL[where]
    with pytest.raises(OSError, match='or that of temporary files. Finished') as e:
        build(s, fills, settings=dict(lr=.2))
    assert e.value.errno == errno.ENOSPC and e.value.__cause__ is FULL[where]
    assert [p for p in visible(s)] == [a.path] and Store(tmp_path).find('sft', a.key)
    assert sorted(f.name for f in build(s, settings=dict(lr=.2)).path.iterdir()) == ['log.csv', 'manifest.json', 'sub']


@pytest.mark.parametrize('call', ['fsync', 'rename'])
def test_full_disk_while_publishing(tmp_path, monkeypatch, call):
    s = Store(tmp_path); a = build(s)

    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match='or that of temporary files. Finished'): build(s, settings=dict(lr=.2))
    monkeypatch.undo()
    assert visible(s) == [a.path]
    assert build(s, settings=dict(lr=.2)).content


# -- keys

def test_what_a_key_depends_on(tmp_path):
    s = Store(tmp_path)
    one, other = build(s), build(s, lambda out: (out/'log.csv').touch(), settings=dict(lr=.2))
    settings, inputs = dict(beta=.1, rows=dict(a=1, b=2)), dict(start=one)
    key = s.key('dpo', 1, settings, inputs)
    for kind, version, other_settings, other_inputs in (
            ('sft', 1, settings, inputs), ('dpo', 2, settings, inputs),
            ('dpo', 1, settings | dict(beta=.1 + 1e-16*2), inputs),
            ('dpo', 1, settings | dict(rows=dict(a=1, b=3)), inputs),
            ('dpo', 1, settings | dict(rows=dict(a=1)), inputs), ('dpo', 1, settings, dict(start=other)),
            ('dpo', 1, settings, dict(other=one)), ('dpo', 1, settings, {})):
        assert s.key(kind, version, other_settings, other_inputs) != key


def test_what_a_key_does_not_depend_on(tmp_path):
    s, t = Store(tmp_path/'s'), Store(tmp_path/'elsewhere')
    a, b = build(s), build(t, settings=dict(lr=.7))
    assert a.content == b.content and a.key != b.key # the same files, made in another way, in another place
    key = s.key('dpo', 1, dict(x=1, y=2), dict(start=a, data=b))
    assert key == t.key('dpo', 1, dict(y=2, x=1), dict(data=a, start=b))


def test_content_is_of_names_and_bytes_only(tmp_path):
    def write(names):
        def fn(out):
            for n in names: (out/n).write_text(n)
            (out/'scratch').mkdir(); (out/'scratch'/'state').write_text(str(time.time()))
        return fn
    a = build(Store(tmp_path/'1'), write('ab')); time.sleep(.02); b = build(Store(tmp_path/'2'), write('ba'))
    assert a.content == b.content and build(Store(tmp_path/'3'), write('ac')).content != a.content


def test_a_key_refuses_what_json_cannot_hold(tmp_path):
    s = Store(tmp_path)
    with pytest.raises(ValueError): s.key('sft', 1, dict(lr=float('nan')), {})
    with pytest.raises(TypeError): s.key('sft', 1, dict(path=tmp_path), {})


# -- what is no store

def test_another_format_and_other_folders(tmp_path):
    (tmp_path/'new').mkdir(); (tmp_path/'new'/'store.json').write_text('{"format": 99}')
    with pytest.raises(ValueError, match='written in format 99, this version reads format 1.*--store'):
        Store(tmp_path/'new')
    (tmp_path/'thesis').mkdir(); (tmp_path/'thesis'/'chapter1.tex').touch()
    with pytest.raises(ValueError, match='holds other files and no store.json.*--store'): Store(tmp_path/'thesis')
    assert [p.name for p in (tmp_path/'thesis').iterdir()] == ['chapter1.tex']
    for text in ('', '{', '[]', '3'):
        (tmp_path/'new'/'store.json').write_text(text)
        with pytest.raises(ValueError, match='store.json.*--store'): Store(tmp_path/'new')
    Store(tmp_path/'absent')
    assert not (tmp_path/'absent').exists()


def test_the_manifest_says_what_made_it(tmp_path):
    s = Store(tmp_path); start = build(s)
    m = build(s, kind='dpo', settings=dict(beta=.1), inputs=dict(start=start)).manifest
    assert m['inputs'] == dict(start=dict(kind='sft', key=start.key, content=start.content, name='model'))
    assert m['settings'] == dict(beta=.1) and m['code_version'] == 1 and m['seed'] == 0
    assert m['seconds'] >= 0 and 'torch' in m['versions']
