"""The configs of scenes: what they build, and that it trains and is tested."""
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint

from tests.tiny import ROOT, build, load_tool

pytest.importorskip('mmseg')
pytestmark = pytest.mark.dense


def load(name, folder):
    """A config, at a size that takes seconds."""
    cfg = Config.fromfile(ROOT / f'configs/seg/{name}_digits-seg.py')
    init_default_scope(cfg.default_scope)
    cfg.train_dataloader.dataset.dataset.scenes = 4
    cfg.train_dataloader.batch_size = 2
    cfg.val_dataloader.dataset.scenes = 2
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if 'CheckTeacher' not in hook['type']]
    cfg.work_dir, cfg.experiment_name = str(folder), f'{name}{folder.name}'
    cfg.randomness.seed = 0
    return cfg


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    cfg = load('teacher', folder)
    torch.manual_seed(0)
    model = build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / 'teacher.pth')
    return str(folder / 'teacher.pth')


@pytest.mark.parametrize('name', ['student', 'kd', 'wsl', 'cwd'])
def test_two_steps_and_a_validation(name, teacher, tmp_path):
    cfg = load(name, tmp_path)
    if name != 'student':
        cfg.model.teacher_ckpt = teacher
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 and all(map(torch.isfinite, torch.tensor(losses)))
    assert runner.message_hub.get_scalar('val/mIoU').current() >= 0
    if name == 'cwd':  # MMRazor's loss of the logits before they are resized
        assert runner.model.distiller.student_recorders.get_recorder('low_logits').source == 'decode_head.conv_seg'


def test_weighted_and_plain_soft_labels_differ_in_the_weight_alone(tmp_path):
    kd, wsl = (load(name, tmp_path).model.distiller.distill_losses for name in ('kd', 'wsl'))
    assert kd.loss_kd.pop('weighting') == 'one'
    assert kd.loss_kd == wsl.loss_wsl


def test_the_students_file_is_mmsegs(teacher, tmp_path, monkeypatch):
    cfg = load('wsl', tmp_path)
    cfg.model.teacher_ckpt = teacher
    runner = Runner.from_cfg(cfg)
    runner.train()
    convert = load_tool('model_converters/convert_kd_ckpt_to_student')
    monkeypatch.setattr(sys, 'argv', ['convert', str(tmp_path / 'epoch_1.pth'), '--out-path',
                                      str(tmp_path / 'student.pth')])
    convert.main()
    plain = build(load('student', tmp_path).model)
    found = load_checkpoint(plain, str(tmp_path / 'student.pth'), map_location='cpu', strict=True)
    assert set(found['state_dict']) == set(plain.state_dict())
    plain.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), runner.model.student.eval()(images))
