"""mmpretrain's networks with fewer strides, as published for 32x32 images; the keys are mmpretrain's."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import MobileNetV2, RepVGG, ShuffleNetV2
from torch import nn

from mmwsl.registry import MODELS


@MODELS.register_module()
class SmallImageMobileNetV2(MobileNetV2):
    """mmpretrain's MobileNetV2 (arXiv 1801.04381) whose stem and second stage keep the resolution.

    Source: chenyaofo/pytorch-cifar-models, ``mobilenetv2.py``. ``CIFARMobileNetV2`` is another network.

    Args:
        kwargs: As for mmpretrain's ``MobileNetV2``.

    Shape: (N, 3, H, W) to a tuple of one (N, C, H / 8, W / 8).
    """

    arch_settings = [
        [*layer[:3], 1 if index == 1 else layer[3]] for index, layer in enumerate(MobileNetV2.arch_settings)
    ]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv1.conv.stride = (1, 1)


@MODELS.register_module()
class SmallImageShuffleNetV2(ShuffleNetV2):
    """mmpretrain's ShuffleNetV2 (arXiv 1807.11164) whose 3x3 stem keeps the resolution, without max-pooling.

    Source: chenyaofo/pytorch-cifar-models, ``shufflenetv2.py``. ``CIFARShuffleNetV2`` has a 1x1 stem.

    Args:
        kwargs: As for mmpretrain's ``ShuffleNetV2``.

    Shape: (N, 3, H, W) to a tuple of one (N, C, H / 8, W / 8).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv1.conv.stride = (1, 1)
        self.maxpool = nn.Identity()


@MODELS.register_module()
class SmallImageRepVGG(RepVGG):
    """mmpretrain's RepVGG (arXiv 2101.03697) whose stem and first stage keep the resolution.

    Source: chenyaofo/pytorch-cifar-models, ``repvgg.py``.

    Args:
        arch: As for mmpretrain's ``RepVGG``.
        kwargs: As for mmpretrain's ``RepVGG``, except ``strides`` and ``deploy``.

    Shape: (N, 3, H, W) to a tuple of one (N, C, H / 8, W / 8).
    """

    def __init__(self, arch: str | dict, **kwargs: Any) -> None:
        super().__init__(arch, strides=(1, 2, 2, 2), **kwargs)
        self.stem.stride = self.stem.branch_3x3.conv.stride = self.stem.branch_1x1.conv.stride = (1, 1)
