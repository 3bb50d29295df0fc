import math
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mmwsl.engine.hooks import HardLossHook
from tests.tiny import PREPROCESSOR, build, distillation, network

pytestmark = pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
DISTILLER = dict(
    type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25))
)


def said(model, losses, epoch=0):
    """What the hook warns of after an epoch whose steps had these losses of the student's own; the last two count."""
    warned = []
    buffer = HistoryBuffer(np.array(losses), np.ones(len(losses)))
    runner = SimpleNamespace(
        model=model,
        epoch=epoch,
        log_processor=SimpleNamespace(window_size=2),
        cfg=ConfigDict(optim_wrapper=dict(optimizer=dict(lr=0.1))),
        message_hub=SimpleNamespace(log_scalars={'train/student.loss': buffer}),
        logger=SimpleNamespace(warning=warned.append),
    )
    HardLossHook().after_train_epoch(runner)
    return warned


@pytest.fixture(scope='module')
def model():
    return build(distillation(distiller=DISTILLER))


def test_a_student_that_guesses_after_the_first_epoch_is_told_what_to_change(model):
    (warned,) = said(model, [9.0, 2.4, 2.8])  # 2.6 is above 1.1 * log 10 = 2.53
    assert "the student's own loss is 2.6, and guessing among 10 classes costs 2.3:" in warned
    assert 'up to 10 times as large. Divide optim_wrapper.optimizer.lr (0.1) by that' in warned  # 1 + 4 * 2.25


@pytest.mark.parametrize('losses, epoch', [([9.0, 2.4, 2.6], 0), ([9.0, 9.0, 9.0], 1), ([math.nan] * 3, 0)], ids=str)
def test_one_that_learns_and_later_epochs_pass(model, losses, epoch):
    assert said(model, losses, epoch) == []


def test_the_students_weight_is_taken_out():
    model = build(distillation(distiller=DISTILLER, student_loss_weight=0.1))
    assert said(model, [0.25, 0.25]) == [] and len(said(model, [0.26, 0.26])) == 1


LINEAR = dict(type='LinearClsHead', num_classes=10, in_channels=8)


@pytest.mark.parametrize(
    'student',
    [
        dict(network(2), head=dict(LINEAR, type='MultiLabelLinearClsHead')),
        dict(network(2), head=dict(LINEAR, loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1))),
        dict(network(2), train_cfg=dict(augments=dict(type='Mixup', alpha=1.0))),
    ],
    ids=['labels', 'smooth', 'mixed'],
)
def test_other_losses_have_another_guess(student):
    losses = (
        dict(DISTILLER)
        if 'MultiLabel' not in student['head']['type']
        else dict(
            type='mmwsl.WSLDistiller',
            distill_losses=dict(loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD'))),
        )
    )
    model = build(distillation(architecture=student, distiller=losses, data_preprocessor=PREPROCESSOR))
    assert said(model, [9.0, 9.0]) == []
