"""The site's pages and the examples in docstrings, as they stand."""

import doctest
import importlib
import math
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmwsl import functional
from mmwsl.models import losses, weightings
from mmwsl.models.losses import SampleLoss, WeightedLoss
from mmwsl.models.weightings import SampleWeighting
from mmwsl.registry import MODELS
from tests.tiny import PREPROCESSOR, ROOT, batch, build, distillation, network
from tests.tiny import losses as losses_of


def page(name):
    return (ROOT / f'docs/{name}.md').read_text()


def blocks(name):
    return re.findall(r'```python\n(.*?)```', page(name), re.DOTALL)


# ---------------------------------------------------------------------------------------------------------- docstrings

WITH_EXAMPLES = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in (ROOT / 'mmwsl').rglob('*.py')
    if '>>> ' in path.read_text()
)


@pytest.mark.parametrize('name', WITH_EXAMPLES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_each_loss_and_weight_has_an_example():
    parts = [getattr(room, name) for room in (losses, weightings) for name in room.__all__]
    parts = [
        part
        for part in parts
        if isinstance(part, type)
        and issubclass(part, (SampleLoss, SampleWeighting, WeightedLoss))
        and part not in (SampleLoss, SampleWeighting)
    ]
    parts += [
        part
        for name, part in vars(functional).items()
        if re.search('(?<!without)_(loss|weight)$', name) and not name.startswith('_')
    ]
    assert len(parts) > 25
    assert [part.__name__ for part in parts if '>>> ' not in part.__doc__] == []


# --------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.slow
def test_the_notebook_trains_and_draws(tmp_path, monkeypatch):
    """And the picture shows what the text describes."""
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    scope = {}
    for block in blocks('digits'):
        exec(block, scope)
    assert scope['teacher'] > 90 and scope['student'] > 85
    low, middle = scope['low'], scope['middle']
    assert low[0] > 0.99 and low[-1] < 0.2 and 0.6 < middle[-1] < 0.95
    # the picture of the images, and that of the weights
    assert {path.name for path in (tmp_path / 'work_dirs/notebook').glob('*.png')} == {'unsure.png', 'weights.png'}
    assert (scope['last']['L_t'][scope['unsure']] >= scope['last']['L_t'].mean()).all()


def test_own_loop_runs():
    scope = {}
    for block in blocks('own_loop'):
        exec(block, scope)
    # images are logits: the student knows nothing, the teacher answers 3 : 1
    student, teacher = nn.Linear(2, 2, bias=False), nn.Identity()
    nn.init.zeros_(student.weight)
    images, labels = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0])
    assert scope['mean_weight'](student, teacher, images, labels) == pytest.approx(0.910133, abs=1e-5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    # ln 2 of the hard loss, and twice w times the soft one, ln 2 as well
    assert scope['train_step'](student, teacher, optimizer, images, labels, tau=1.0, alpha=2.0) == pytest.approx(
        math.log(2) * (1 + 2 * 0.910133), abs=1e-5
    )
    assert student.weight.abs().sum() > 0
    preds, truth = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]])
    # one pixel counts: w = 1 - 1/e, and tau^2 ln 2
    assert scope['pixel_loss'](preds, preds, truth).item() == pytest.approx(0.632121 * 4 * math.log(2), abs=1e-4)
    assert torch.isfinite(scope['weighted_dkd'](torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)))


def test_several_teachers_are_one(tmp_path):
    block, configs = blocks('several_teachers')[0], f'{ROOT}/configs'
    block = block.replace("'wsl_r56", f"'{configs}/wsl_r56").replace("'_base_/", f"'{configs}/_base_/")
    (tmp_path / 'two.py').write_text(block)
    model = Config.fromfile(tmp_path / 'two.py').model
    assert model.teacher_ckpt is None and model.teacher.ckpts == [
        'checkpoints/resnet56_cifar100.pth',
        'checkpoints/resnet44_cifar100.pth',
    ]
    assert [member.backbone.depth for member in model.teacher.models] == [56, 44]
    init_default_scope('mmpretrain')
    assert len(MODELS.build({**model.teacher, 'ckpts': None}).members) == 2


def test_table_of_saturated_weights():
    """Written out in plain Python."""
    columns = [float(cell) for cell in re.findall(r'student (0\.\d+)', page('saturation'))]
    rows = re.findall(r'\| \*\*teacher (0\.\d+)\*\* \| (.*) \|', page('saturation'))
    assert len(columns) == 4 and len(rows) == 3
    for teacher, cells in rows:
        expected = [f'{1 - math.exp(-math.log(student) / math.log(float(teacher))):.3f}' for student in columns]
        assert cells.split(' | ') == expected


def of_sigmoids():
    head = dict(type='mmpretrain.MultiLabelLinearClsHead', num_classes=10, in_channels=8)
    return distillation(
        architecture={**network(2), 'head': head},
        teacher={**network(2), 'head': head},
        data_preprocessor={**PREPROCESSOR, 'to_onehot': True},
        distiller=dict(
            type='mmwsl.WSLDistiller',
            distill_losses=dict(
                loss_wsl=dict(
                    type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD'), weighting=dict(type='WSLWeighting')
                )
            ),
        ),
    )


@pytest.mark.parametrize('config', [distillation(), of_sigmoids()], ids=['softmax', 'sigmoids'])
def test_the_log_page_names_what_is_logged(config):
    names = set(losses_of(build(config), batch()))
    assert len(names) > 5
    assert names <= set(re.findall('`([^`]*)`', page('log')))
