"""docs/own_parts.md, as it stands."""

import math
import os
import re
import sys

import pytest
import torch
from mmengine.config import Config

from mmwsl.models import WeightedLoss
from mmwsl.registry import MODELS
from tests.tiny import ROOT, batch, build, losses, save_teacher, tool

PAGE = (ROOT / 'docs/own_parts.md').read_text()
PARTS, CONFIG, TRIAL = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the page's two files, beside the configs."""
    (tmp_path / 'my_parts.py').write_text(PARTS)
    (tmp_path / 'my_digits.py').write_text(CONFIG)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop('my_parts', None)
    for name in ('MarginWeighting', 'ReverseKL'):
        MODELS.module_dict.pop(name, None)


def test_the_config_trains_a_step(files):
    cfg = Config.fromfile(files / 'my_digits.py')
    model = build({**cfg.model, 'teacher_ckpt': save_teacher(files / 'teacher.pth', cfg.model.teacher)})
    found = losses(model, batch())
    total, logged = model.parse_losses(found)
    total.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.student.parameters())
    assert 0 < logged['distill.wsl_weight'] < 1 and logged['distill.loss_wsl'] > 0


def test_the_trial_runs(files, capsys):
    exec(TRIAL, {})
    assert 'wsl_weight_p50' in capsys.readouterr().out


def test_values_worked_by_hand(files):
    import my_parts

    # student (1/2, 1/4, 1/4), teacher (3/4, 1/8, 1/8): KL = 1/2 ln 2/3 + 1/2 ln 2, margin = 5/8
    student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.75, 0.125, 0.125]]).log()
    loss = WeightedLoss(my_parts.ReverseKL(), my_parts.MarginWeighting())
    assert loss(student, teacher, torch.tensor([1])).item() == pytest.approx(0.625 * math.log(4 / 3) / 2)


@pytest.mark.slow
def test_the_command_trains(files):
    cfg = Config.fromfile(files / 'my_digits.py')
    (files / 'checkpoints').mkdir()
    save_teacher(files / 'checkpoints/digits_teacher.pth', cfg.model.teacher)
    assert 'PYTHONPATH=. python tools/train.py my_digits.py' in PAGE
    done = tool(
        'train.py',
        'my_digits.py',
        '--no-validate',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        'custom_hooks.1.min_accuracy=0',
        cwd=files,
        env={**os.environ, 'PYTHONPATH': f'.:{ROOT}'},
    )
    assert 'distill.wsl_weight' in done.stdout and (files / 'work_dirs/my_digits/epoch_1.pth').exists()
