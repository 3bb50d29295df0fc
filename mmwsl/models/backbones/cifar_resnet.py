from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR

from mmwsl.registry import MODELS


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """The three-stage ResNet for 32x32 images of He et al. (arXiv 1512.03385, Sec. 4.2): depth 6n + 2.

    mmpretrain's ``ResNet_CIFAR`` is the four-stage ImageNet network with another stem; this is the one that papers call
    ResNet-20 or ResNet-56, key for key. With stem 32 and base 64 it is their "x4".

    Args:
        depth: 8, 14, 20, 32, 44, 56 or 110.
        stem_channels: Channels of the stem.
        base_channels: Channels of the first stage; each further stage doubles them.
        out_indices: Stages whose output is returned.
        zero_init_residual: Zero the last norm layer of each block at first. The field's code does not.
        kwargs: As of mmpretrain's ``ResNet``.
    """
    arch_settings = {6 * n + 2: (BasicBlock, (n, n, n)) for n in (1, 2, 3, 5, 7, 9, 18)}

    def __init__(self, depth: int, stem_channels: int = 16, base_channels: int = 16,
                 out_indices: Sequence[int] = (2, ), zero_init_residual: bool = False, **kwargs: Any) -> None:
        super().__init__(
            depth, stem_channels=stem_channels, base_channels=base_channels, out_indices=out_indices,
            zero_init_residual=zero_init_residual, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), **kwargs)
