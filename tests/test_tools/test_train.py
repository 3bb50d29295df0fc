import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from mmengine import load

from tests.tiny import ROOT, build, free_port, launch, network, save_teacher, tool

# short epochs of the real recipe; the check of the teacher would only take time here
SHORT = (
    '--no-validate',
    '--cfg-options',
    'train_dataloader.batch_size=16',
    'train_dataloader.num_batch_per_epoch=6',
    'train_cfg.max_epochs=3',
    'default_hooks.logger.interval=1',
    'randomness.seed=7',
)


@pytest.fixture
def teacher(tmp_path, published_teacher):
    path = tmp_path / 'resnet56.pth'
    tool(
        'model_converters/import_teacher.py',
        published_teacher(56),
        path,
        '--config',
        'configs/wsl_r56_r20_cifar100.py',
        cwd=ROOT,
    )
    return path


def weights(work_dir):
    return torch.load(work_dir / 'epoch_3.pth', weights_only=False)['state_dict']


def kill_in_the_second_epoch(work_dir, *options):
    command = [
        sys.executable,
        '-W',
        'ignore',
        'tools/train.py',
        'configs/wsl_r56_r20_cifar100.py',
        '--work-dir',
        str(work_dir),
        '--verbose',
        *options,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if 'Epoch(train) [2][3/6]' in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (work_dir / 'epoch_1.pth').exists() and not (work_dir / 'epoch_2.pth').exists()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_very_weights_of_one_that_was_not(tmp_path, cifar100, teacher):
    def options(workers):
        return (*SHORT, f'model.teacher_ckpt={teacher}', f'train_dataloader.num_workers={workers}')

    tool('train.py', 'configs/wsl_r56_r20_cifar100.py', '--work-dir', tmp_path / 'unbroken', *options(0), cwd=ROOT)
    for workers in (0, 2):
        work_dir = tmp_path / f'killed_{workers}'
        kill_in_the_second_epoch(work_dir, *options(workers))
        tool(
            'train.py',
            'configs/wsl_r56_r20_cifar100.py',
            '--work-dir',
            work_dir,
            '--resume',
            *options(workers),
            cwd=ROOT,
        )
        torch.testing.assert_close(weights(work_dir), weights(tmp_path / 'unbroken'), rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    torch.manual_seed(0)
    teacher = network(16, depth=14)
    torch.save(build(teacher).state_dict(), tmp_path / 'teacher.pth')
    options = (
        '--no-validate',
        '--cfg-options',
        f'model.teacher_ckpt={tmp_path / "teacher.pth"}',
        'model.teacher_norm_eval=True',
        'train_cfg.max_epochs=1',
        'randomness.seed=3',
        # without BatchNorm, which would see other batches
        'model.architecture.backbone.norm_cfg.type=GN',
        'model.architecture.backbone.norm_cfg.num_groups=1',
    )
    tool(
        'train.py',
        'configs/wsl_digits.py',
        '--work-dir',
        tmp_path / 'one',
        *options,
        'train_dataloader.batch_size=50',
        cwd=ROOT,
    )
    said = launch(
        'dist_train.sh',
        'configs/wsl_digits.py',
        2,
        '--work-dir',
        tmp_path / 'two',
        *options,
        'train_dataloader.batch_size=25',
    )
    one, two = (torch.load(tmp_path / name / 'epoch_1.pth', weights_only=False) for name in ('one', 'two'))
    assert one['meta']['iter'] == two['meta']['iter'] == 12
    torch.testing.assert_close(two['state_dict'], one['state_dict'], rtol=1e-4, atol=1e-5)
    assert 'find_unused_parameters=True' not in said


FAILING = """import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class FailingHook(Hook):

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path):
    """The other one waits for its gradients, which never come."""
    (tmp_path / 'failing.py').write_text(FAILING)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{ROOT}/configs/wsl_digits.py'\nmodel = dict(teacher_ckpt=None)\n"
        "custom_imports = dict(imports=['failing'])\n"
        "custom_hooks = [dict(type='mmwsl.EpochSeedHook'), dict(type='FailingHook')]\n"
    )
    ended = subprocess.run(
        ['bash', 'tools/dist_train.sh', config, '2', '--work-dir', tmp_path / 'run', '--no-validate'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,  # of a machine that is slow; the other process would wait for half an hour
        env=environment(PYTHON=sys.executable, PORT=free_port(), PYTHONPATH=str(tmp_path)),
    )
    assert ended.returncode == 1
    assert re.search(r'rank +: 1 .*\n *exitcode +: -9 ', ended.stdout), ended.stdout[-4000:]


def environment(**extra):
    return {**os.environ, **extra}


@pytest.mark.slow
def test_two_processes_test_as_one(tmp_path):
    checkpoint = save_teacher(tmp_path / 'student.pth', network(2))
    one, two = tmp_path / 'one.pkl', tmp_path / 'two.pkl'
    tool('test.py', 'configs/wsl_digits.py', checkpoint, '--work-dir', tmp_path, '--out', one, cwd=ROOT)
    launch('dist_test.sh', 'configs/wsl_digits.py', checkpoint, 2, '--work-dir', tmp_path, '--out', two)
    one, two = (
        {key: torch.stack([sample[key] for sample in load(path)]) for key in ('pred_score', 'gt_label')}
        for path in (one, two)
    )
    assert len(one['pred_score'].unique(dim=0)) > 1000 and not (ROOT / '.dist_test').exists()
    torch.testing.assert_close(two, one)


def test_slurm_gets_what_it_was_asked_for(tmp_path):
    (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    command = ['bash', ROOT / 'tools/slurm_train.sh', 'gpus', 'a job', 'config.py', 'work dir', '--amp']
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment(
            PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='16', PYTHON='python', SRUN_ARGS='--exclusive --mem=0'
        ),
    )
    asked = done.stdout.splitlines()
    script = asked.index('python')
    assert {
        '-p',
        'gpus',
        '--job-name=a job',
        '--ntasks=16',
        '--ntasks-per-node=8',
        '--gres=gpu:8',
        '--exclusive',
        '--mem=0',
    } < set(asked[:script])
    assert asked[script + 3 :] == ['config.py', '--work-dir=work dir', '--launcher=slurm', '--amp']


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """ImageNet's layout: 1,000 class folders, with one image each."""
    from PIL import Image

    root = tmp_path_factory.mktemp('imagenet')
    Image.effect_noise((256, 256), 50).convert('RGB').save(root / 'noise.JPEG')
    image = (root / 'noise.JPEG').read_bytes()
    for split in ('train', 'val'):
        for index in range(1000):
            folder = root / split / f'n{index:08}'
            folder.mkdir(parents=True)
            (folder / 'image.JPEG').write_bytes(image)
    return root


@pytest.mark.slow
@pytest.mark.parametrize('config', ['wsl_r34_r18_in1k', 'wsl_r50_mbv1_in1k'])
def test_imagenet_pair_takes_two_steps(tmp_path, imagenet, config):
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    torch.save(build(cfg.model.teacher).state_dict(), tmp_path / 'teacher.pth')
    done = tool(
        'train.py',
        f'configs/{config}.py',
        '--work-dir',
        tmp_path,
        '--no-validate',
        '--cfg-options',
        f'train_dataloader.dataset.dataset.data_root={imagenet}',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'train_dataloader.num_batch_per_epoch=2',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        f'model.teacher_ckpt={tmp_path / "teacher.pth"}',
        cwd=ROOT,
    )
    assert ' 1/1 2/2 ' in done.stdout
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert saved['meta']['iter'] == 2 and not any('teacher' in key for key in saved['state_dict'])


@pytest.mark.slow
@pytest.mark.parametrize('depth, accuracy', [(56, '72.6300')])
def test_published_teacher_scores_what_it_should(tmp_path, cifar100, published_teacher, depth, accuracy):
    config = ROOT / f'configs/vanilla/r{depth}_cifar100.py'
    tool('model_converters/import_teacher.py', published_teacher(depth), tmp_path / 'net.pth', '--config', config)
    done = tool(
        'test.py', config, tmp_path / 'net.pth', '--work-dir', tmp_path, cwd=ROOT, env=environment(OMP_NUM_THREADS='2')
    )
    assert f'accuracy/top1: {accuracy}' in done.stdout
