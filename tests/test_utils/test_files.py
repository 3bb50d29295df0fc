import errno
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from mmwsl.utils import files
from mmwsl.utils.files import lock, whole_file
from tests.tiny import ROOT

AS_ON_WINDOWS = """
import os, pathlib, sys

sys.modules['fcntl'] = None  # cannot be imported
real_open = os.open

def open_no_folder(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', str(path))
    return real_open(path, *args, **kwargs)

os.open = open_no_folder
import mmwsl.cache, mmwsl.engine, mmwsl.utils

with mmwsl.utils.whole_file(pathlib.Path(sys.argv[1])) as file:
    file.write(b'[1, 2]')
"""


def test_works_without_fcntl_and_without_folders_that_open(tmp_path):
    path = tmp_path / 'new' / 'file.json'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', AS_ON_WINDOWS, path], cwd=ROOT, check=True)
    assert json.loads(path.read_text()) == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == ['file.json']


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b'new')
        raise KeyError
    assert path.read_bytes() == b'old'
    assert [file.name for file in tmp_path.iterdir()] == ['file']


def write_and_read(path, writer):
    """Write a block of one byte in two pieces; return what is read then."""
    with whole_file(path) as file:
        file.write(bytes([writer]) * 60_000)
        file.flush()
        file.write(bytes([writer]) * 60_000)
    return path.read_bytes()


def in_threads(path, writers):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda writer: write_and_read(path, writer), writers))


@pytest.mark.parametrize('processes', [1, 3])
def test_many_writers_of_one_file(tmp_path, processes):
    """Every reader sees the whole file of one of them."""
    path, shares = tmp_path / 'file', [range(place, 90, processes) for place in range(processes)]
    if processes == 1:
        read = in_threads(path, *shares)
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context('fork')) as pool:
            read = [content for found in pool.map(in_threads, [path] * processes, shares) for content in found]
    assert len(read) == 90 and {(len(content), len(set(content))) for content in read} == {(120_000, 1)}
    assert [file.name for file in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize(
    'umask, mode, expected', [(0o022, 0o600, 0o600), (0o077, 0o664, 0o664), (0o022, None, 0o644), (0o077, None, 0o600)]
)
def test_a_file_keeps_its_mode(tmp_path, umask, mode, expected):
    path = tmp_path / 'file'
    if mode is not None:
        path.touch()
        path.chmod(mode)
    before = os.umask(umask)
    try:
        with whole_file(path) as file:
            seen = [entry.stat().st_mode & 0o777 for entry in tmp_path.glob('*.partial')]
            file.write(b'new')
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == expected and seen == [expected]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Even if its name is known before."""
    monkeypatch.setattr(files.secrets, 'token_hex', lambda _: 'guessed')
    victim, path = tmp_path / 'victim', tmp_path / 'file'
    victim.write_bytes(b'kept')
    (tmp_path / 'file.guessed.partial').symlink_to(victim)
    with pytest.raises(FileExistsError), whole_file(path) as file:
        file.write(b'new')
    assert victim.read_bytes() == b'kept' and not path.exists()


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_full_disk_leaves_the_old_file_and_no_remains(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    path = tmp_path / 'file'
    path.write_bytes(b'old')
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match='No space left'), whole_file(path) as file:
        file.write(b'new')
    assert path.read_bytes() == b'old'
    assert [file.name for file in tmp_path.iterdir()] == ['file']


def test_a_storage_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.EINVAL, 'Invalid argument')
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    with whole_file(tmp_path / 'file') as file:
        file.write(b'new')
    assert (tmp_path / 'file').read_bytes() == b'new'


def test_the_longest_name_is_written_to(tmp_path):
    with whole_file(tmp_path / ('x' * 255)) as file:
        file.write(b'new')
    assert (tmp_path / ('x' * 255)).read_bytes() == b'new'


def test_a_lock_ends_with_its_file(tmp_path):
    with (tmp_path / 'lock').open('a') as first:
        lock(first, 'busy with it')
        with (tmp_path / 'lock').open('a') as second, pytest.raises(RuntimeError, match='busy with it: wait for it'):
            lock(second, 'busy with it')
    with (tmp_path / 'lock').open('a') as third:
        lock(third, 'busy with it')
