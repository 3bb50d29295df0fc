"""The networks begin as the field's code draws them; that they are the right networks is in test_configs.py."""

import math

import pytest
import torch
from mmengine.config import Config
from torch import nn

from tests.tiny import ROOT, build


def network(name):
    torch.manual_seed(0)
    return build(Config.fromfile(ROOT / f'configs/vanilla/{name}_cifar100.py').model)


def kaiming_fan_out(conv):
    return math.sqrt(2 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))


def torch_default(layer):
    """Standard deviation of the uniform distribution that nn.Linear and nn.Conv2d draw from."""
    return 1 / math.sqrt(3 * layer.weight[0].numel())


@pytest.mark.parametrize(
    'name, conv_std, linear_std, bias_is_zero',
    [
        *[(name, kaiming_fan_out, torch_default, False) for name in ('r20', 'r8x4', 'r50')],
        ('wrn16-2', kaiming_fan_out, torch_default, True),
        *[(name, kaiming_fan_out, lambda layer: 0.01, True) for name in ('vgg8', 'mbv2')],
        *[(name, torch_default, torch_default, False) for name in ('sv1', 'sv2')],
    ],
)
def test_initialisation_is_the_fields(name, conv_std, linear_std, bias_is_zero):
    model = network(name)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() >= 1000]
    assert convs
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(conv_std(conv), rel=0.12)
        assert conv.bias is None or not conv.bias.any()
    assert model.head.fc.weight.std().item() == pytest.approx(linear_std(model.head.fc), rel=0.05)
    assert bool(model.head.fc.bias.any()) != bias_is_zero
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)
