"Writing whole: under kills, full disks and two writers at once, a final name stands for whole content or for nothing."
import errno
import os
import signal
import subprocess
import sys

import pytest

from solar_repro.core import files
from solar_repro.core.files import content_hash, file_hash, folder_files, locked, rename_whole, whole, write_whole

KILLED = '''
import os, signal, sys
from pathlib import Path
from solar_repro.core.files import whole, write_whole

def write_folder(path):
    with whole(path) as private:
        (private/'inner').mkdir(parents=True)
        (private/'inner'/'a').write_text('x'*10_000)
        (private/'b').write_text('y'*10_000)

real, calls = getattr(os, sys.argv[2]), 0
def counted(*args, **kwargs):
    global calls
    if calls == last: os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    return real(*args, **kwargs)

folder = Path(sys.argv[1])
for k in range(100):
    (folder/str(k)).mkdir()
    write_whole(folder/str(k)/'file', 'old')
    pid = os.fork()
    if pid == 0:
        calls, last = 0, k
        setattr(os, sys.argv[2], counted)
        write_whole(folder/str(k)/'file', 'new'*10_000)
        write_folder(folder/str(k)/'folder')
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0: break
print(k)
'''


@pytest.mark.parametrize('call', ['open', 'fsync', 'rename'])
def test_killed_at_every_call(tmp_path, call):
    "The k-th call is the last one, for every k, until everything gets written."
    p = subprocess.run([sys.executable, '-c', KILLED, tmp_path, call], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    kills = int(p.stdout)
    assert kills >= 2
    for k in range(kills + 1):
        assert (tmp_path/str(k)/'file').read_text() in ('old', 'new'*10_000)
        folder = tmp_path/str(k)/'folder'
        if folder.exists():
            assert {n: f['bytes'] for n, f in folder_files(folder).items()} == {'b': 10_000, 'inner/a': 10_000}
    assert (tmp_path/str(kills)/'file').read_text() == 'new'*10_000 and folder.exists()


@pytest.mark.parametrize('call', ['fsync', 'rename'])
@pytest.mark.parametrize('old', [None, 'old'])
def test_a_full_disk_leaves_nothing_new(tmp_path, monkeypatch, call, old):
    if old: write_whole(tmp_path/'file', old)

    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as e: write_whole(tmp_path/'file', 'new')
    assert e.value.errno == errno.ENOSPC
    with pytest.raises(OSError), whole(tmp_path/'folder') as private:
        private.mkdir()
        (private/'a').write_text('x')
    monkeypatch.undo()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([('file', 'old')] if old else [])


def test_a_writer_that_fails_or_is_interrupted(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole(tmp_path/'folder') as private:
            private.mkdir()
            (private/'half').touch()
            raise error
        assert not list(tmp_path.iterdir())


def test_everything_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, 'sync', lambda p: done.append(('sync', p.name)))
    real = os.rename
    monkeypatch.setattr(os, 'rename', lambda a, b: (done.append(('rename', b.name)), real(a, b)))
    (tmp_path/'private'/'inner').mkdir(parents=True)
    (tmp_path/'private'/'inner'/'a').touch()
    rename_whole(tmp_path/'private', tmp_path/'final')
    assert done == [('sync', 'inner'), ('sync', 'a'), ('sync', 'private'), ('rename', 'final'), ('sync', tmp_path.name)]


def test_the_private_name_keeps_the_ending_and_is_nobody_elses(tmp_path):
    with whole(tmp_path/'figure.png') as one, whole(tmp_path/'figure.png') as other:
        assert one != other and {one.suffix, other.suffix} == {'.png'} and one.parent == tmp_path
        one.write_text('1')
        other.write_text('2')
    assert (tmp_path/'figure.png').read_text() == '1' and len(list(tmp_path.iterdir())) == 1


def test_text_and_bytes(tmp_path):
    assert write_whole(tmp_path/'a', '±\n').read_bytes() == '±\n'.encode()
    assert write_whole(str(tmp_path/'a'), b'\0\r\n').read_bytes() == b'\0\r\n'
    with pytest.raises(FileNotFoundError): write_whole(tmp_path/'absent'/'a', 'x')


def test_rights_are_those_of_any_other_file(tmp_path):
    (tmp_path/'plain').write_text('x')
    assert write_whole(tmp_path/'whole', 'x').stat().st_mode == (tmp_path/'plain').stat().st_mode


def test_a_lock_is_free_after_a_kill(tmp_path):
    code = '''
import sys, time
from pathlib import Path
from solar_repro.core.files import locked
with locked(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(600)
'''
    p = subprocess.Popen([sys.executable, '-c', code, tmp_path/'lock'], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n'
    with pytest.raises(BlockingIOError), locked(tmp_path/'lock'): pass
    told = []

    def kill():
        told.append(1)
        p.send_signal(signal.SIGKILL)
    with locked(tmp_path/'lock', kill): assert told == [1]
    p.communicate()


def test_a_lock_whose_file_was_removed_is_made_again(tmp_path):
    "The one who held it may have renamed or removed the folder in which it stood."
    lock = tmp_path/'lock'

    def holder():
        with locked(lock):
            yield
            lock.unlink()
        yield
    first = holder()
    next(first)
    with locked(lock, lambda: next(first)):
        assert lock.exists()
        with pytest.raises(BlockingIOError), locked(lock): pass


def test_content_is_of_names_and_bytes(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'x').write_text('1')
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'x').write_text('1')
    os.utime(tmp_path/'b'/'x', (0, 0))
    assert content_hash(folder_files(tmp_path/'a')) == content_hash(folder_files(tmp_path/'b'))
    assert folder_files(tmp_path/'a')['x'] == dict(sha256=file_hash(tmp_path/'b'/'x'), bytes=1)
    (tmp_path/'b'/'x').write_text('2')
    assert content_hash(folder_files(tmp_path/'a')) != content_hash(folder_files(tmp_path/'b'))
