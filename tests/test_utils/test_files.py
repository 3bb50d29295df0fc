import json
import subprocess
import sys

import pytest

from mmwsl.utils.files import lock, whole_file
from tests.tiny import ROOT

AS_ON_WINDOWS = '''
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
'''


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


def test_a_lock_ends_with_its_file(tmp_path):
    with (tmp_path / 'lock').open('a') as first:
        lock(first, 'busy with it')
        with (tmp_path / 'lock').open('a') as second, pytest.raises(RuntimeError, match='busy with it: wait for it'):
            lock(second, 'busy with it')
    with (tmp_path / 'lock').open('a') as third:
        lock(third, 'busy with it')
