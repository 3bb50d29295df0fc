"""The fetched folder is whole or not there, and a failure says what to do."""

import subprocess
import sys

import pytest

from tests.tiny import ROOT, load_tool

tool = load_tool('fetch_bccd')


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / 'source'
    (folder / 'BCCD/JPEGImages').mkdir(parents=True)
    (folder / 'BCCD/JPEGImages/cells.jpg').write_bytes(b'a\r\nb')
    (folder / 'LICENSE').write_text('MIT')
    (folder / 'export.py').write_text('')
    tool.git('init', '--quiet', str(folder))
    tool.git('-C', str(folder), 'add', '--all')
    who = ('-c', 'user.name=a', '-c', 'user.email=a@b.c', '-c', 'commit.gpgsign=false')
    tool.git('-C', str(folder), *who, 'commit', '--quiet', '--message', 'cells')
    return folder


def test_the_folder_has_the_images_and_the_licence_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'TREE', tool.git('-C', str(source), 'rev-parse', 'HEAD:BCCD'))
    out = tmp_path / 'data/bccd'
    tool.fetch(source.as_uri(), out)
    assert sorted(path.name for path in out.rglob('*') if path.is_file()) == ['LICENSE', 'cells.jpg']
    assert (out / 'JPEGImages/cells.jpg').read_bytes() == b'a\r\nb'
    assert list(out.parent.iterdir()) == [out]


def test_other_files_than_expected_are_refused_and_removed(source, tmp_path):
    with pytest.raises(ValueError, match=f'has changed: its folder BCCD has the hash .*, and {tool.TREE} was'):
        tool.fetch(source.as_uri(), tmp_path / 'data/bccd')
    assert not list((tmp_path / 'data').iterdir())


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / 'mine').touch()
    with pytest.raises(FileExistsError, match='exists. Delete it to fetch it again, or name another folder with --out'):
        tool.fetch('anywhere', tmp_path)
    assert (tmp_path / 'mine').exists()


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='git is needed'):
        tool.fetch('anywhere', tmp_path / 'bccd')


def test_what_git_says_is_the_error(tmp_path):
    command = [sys.executable, ROOT / 'tools/fetch_bccd.py', '--source', tmp_path / 'none', '--out', tmp_path / 'bccd']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert f'Error: git could not fetch {tmp_path}/none: fatal:' in run.stderr and 'Traceback' not in run.stderr
    assert not (tmp_path / 'bccd').exists()
