import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmwsl.utils.looks_like import looks_like
from tests.tiny import ROOT


@pytest.mark.parametrize(
    'config, expected',
    [
        ('r56_cifar100', 'a CIFAR ResNet of depth 56 with 100 classes'),
        ('r20_cifar10', 'a CIFAR ResNet of depth 20 with 10 classes'),
        ('r8x4_cifar100', 'a CIFAR ResNet of depth 8 and width 4 with 100 classes'),
        ('wrn16-2_cifar100', 'a WideResNet of depth 16 and width 2 with 100 classes'),
        ('r18_in1k', 'a ResNet of depth 18 with 1000 classes'),
        ('r50_cifar100', 'a ResNet of depth 50 with 100 classes'),
        ('swin-t_in1k', 'a vision transformer of 12 layers with 1000 classes'),
        ('sv1_cifar100', 'a network of 49 convolutions with 24 to 960 channels, and 100 classes'),
        ('sv2_cifar100', 'a network of 56 convolutions with 24 to 1024 channels, and 100 classes'),
        ('vgg8_cifar100', 'a network of 5 convolutions with 64 to 512 channels, and 100 classes'),
    ],
)
def test_networks_of_the_configs(config, expected):
    cfg = Config.fromfile(ROOT / f'configs/vanilla/{config}.py')
    init_default_scope(cfg.default_scope)
    assert looks_like(MODELS.build(cfg.model).state_dict()) == expected


def published(stages, convolutions, classifier, block='layer{stage}.{place}', classes=10, width=16):
    """A state dict under the names of other code, as far as they matter."""
    names = [
        f'{block.format(stage=stage, place=place)}.conv{number}.weight'
        for stage, count in enumerate(stages, 1)
        for place in range(count)
        for number in range(1, convolutions + 1)
    ]
    return {
        'conv1.weight': torch.empty(16, 3, 3, 3),
        **{name: torch.empty(width, 16, 3, 3) for name in names},
        f'{classifier}.weight': torch.empty(classes, 64),
        f'{classifier}.bias': torch.empty(classes),
    }


@pytest.mark.parametrize(
    'weights, expected',
    [
        (published((9, 9, 9), 2, 'fc', classes=100), 'a CIFAR ResNet of depth 56 with 100 classes'),
        (published((3, 4, 6, 3), 3, 'linear'), 'a ResNet of depth 50 with 10 classes'),
        (
            {
                **published((6, 6, 6), 2, 'fc', 'block{stage}.layer.{place}', 5, width=32),
                'block1.layer.0.convShortcut.weight': torch.empty(32, 16, 1, 1),
            },
            'a WideResNet of depth 40 and width 2 with 5 classes',
        ),
        (
            {f'module.{key}': value for key, value in published((2, 2, 2), 2, 'fc').items()},
            'a CIFAR ResNet of depth 14 with 10 classes',
        ),
        ({f'blocks.{i}.attn.qkv.weight': torch.empty(3, 3) for i in range(12)}, 'a vision transformer of 12 layers'),
        ({'a': torch.empty(1)}, 'a network'),
    ],
)
def test_published_layouts(weights, expected):
    assert looks_like(weights) == expected
