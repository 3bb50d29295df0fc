"""One training in a work dir at a time."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from mmwsl.engine import finish_run, launch, read_config, sole_training
from tests.tiny import ROOT

HOLD = """
import os, sys
from mmengine.config import Config
from mmwsl.engine import sole_training

with sole_training(Config(dict(launcher='none', work_dir=sys.argv[1]))):
    if not os.fork():  # as a worker of a dataloader, which outlives it
        print('worker', os.getpid(), flush=True)
    sys.stdin.read()
"""


def config(work_dir, launcher='none'):
    return Config(dict(launcher=launcher, work_dir=str(work_dir)))


def test_a_second_training_is_refused_and_one_after_it_is_not(tmp_path):
    with sole_training(config(tmp_path)):
        holder = json.loads((tmp_path / 'training.lock').read_text())
        assert holder['process'] == os.getpid()
        with (
            pytest.raises(
                RuntimeError,
                match=rf'another training runs in {tmp_path} \(process {os.getpid()} on '
                rf'{holder["host"]}, since {holder["since"]}\).*--work-dir.*: wait for it or end it',
            ),
            sole_training(config(tmp_path)),
        ):
            pass
        with sole_training(config(tmp_path / 'other')):
            pass
    with sole_training(config(tmp_path)):
        pass


def test_a_killed_training_holds_nothing_though_its_workers_live_on(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-c', HOLD, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        worker = next(int(line.split()[1]) for line in process.stdout if line.startswith('worker'))
        with pytest.raises(RuntimeError, match=f'process {process.pid} on'), sole_training(config(tmp_path)):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        os.kill(worker, 0)  # it lives
        with sole_training(config(tmp_path)):
            pass


@pytest.mark.parametrize(
    'launcher, rank, locks', [('none', '1', True), ('pytorch', '0', True), ('pytorch', '1', False)]
)
def test_the_first_process_of_a_run_locks(tmp_path, monkeypatch, launcher, rank, locks):
    monkeypatch.setenv('RANK', rank)
    with sole_training(config(tmp_path, launcher)):
        assert (tmp_path / 'training.lock').exists() is locks


def test_a_storage_without_locks_is_a_warning(tmp_path, monkeypatch):
    told = []

    def lock(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(launch, 'lock', lock)
    monkeypatch.setattr(launch, 'print_log', lambda text, *_: told.append(text))
    with sole_training(config(tmp_path)):
        pass
    assert f'training.lock cannot be locked ([Errno {errno.ENOLCK}] No locks available): a second training' in told[0]


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / 'victim').write_text('kept')
    (tmp_path / 'training.lock').symlink_to(tmp_path / 'victim')
    with pytest.raises(OSError), sole_training(config(tmp_path)):
        pass
    assert (tmp_path / 'victim').read_text() == 'kept'


@pytest.mark.parametrize('used', [False, True])
def test_the_folder_of_collected_results_is_removed_unless_another_run_uses_it(tmp_path, monkeypatch, used):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '.dist_test/other' if used else tmp_path / '.dist_test').mkdir(parents=True)
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    finish_run()
    assert (tmp_path / '.dist_test').exists() is used


def test_a_config_of_an_installed_package_is_read():
    cfg = read_config('mmrazor::distill/mmcls/wsld/wsld_logits_resnet34_resnet18_8xb32_in1k.py')
    assert cfg.model.distiller.distill_losses.loss_wsld == dict(type='WSLD', tau=2, loss_weight=2.5)
    assert read_config(str(ROOT / 'configs/wsl_digits.py')).model.type == 'mmwsl.WSLDistill'


@pytest.mark.parametrize(
    'path, message',
    [
        (
            ROOT / 'configs/wsl_digit.py',
            f'there is no config .*wsl_digit.py. Did you mean {ROOT}/configs/wsl_digits.py',
        ),
        ('nowhere/x.py', 'there is no config nowhere/x.py. configs/README.md lists'),
    ],
)
def test_a_config_that_is_not_there_is_explained(path, message):
    with pytest.raises(FileNotFoundError, match=message):
        launch.read_config(str(path))


def test_a_package_that_is_not_installed_is_named_and_not_fetched():
    with pytest.raises(ModuleNotFoundError, match=r'mmtrack::sot/a\.py is a config of mmtrack, which is not installed'):
        read_config('mmtrack::sot/a.py')


def test_a_config_that_is_not_python_is_explained(tmp_path):
    (tmp_path / 'it.py').write_text('a = dict(\n    b=1\n    c=2)\n')
    with pytest.raises(
        ValueError, match=r'it\.py, or .* is not Python: invalid syntax.* \(line 2: b=1\)\. Correct this line'
    ):
        read_config(str(tmp_path / 'it.py'))
