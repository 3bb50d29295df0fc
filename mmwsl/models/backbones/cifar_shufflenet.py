from __future__ import annotations

from typing import Any

import torch
from mmpretrain.models.backbones import ShuffleNetV2
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.utils import channel_shuffle
from torch import Tensor, nn

from mmwsl.registry import MODELS


@MODELS.register_module()
class CIFARShuffleNetV1(BaseBackbone):
    """ShuffleNet for 32x32 images as used in papers on distillation, with three groups.

    It differs from ShuffleNet (arXiv 1707.01083), which mmpretrain has: the stem is a 1x1 convolution that keeps the
    resolution, the bottleneck of a unit that halves the resolution is narrower (a quarter of its new channels alone),
    and an activation follows the depthwise convolution. Keys are those of the source, RepDistiller (arXiv 1910.10699),
    ``models/ShuffleNetv1.py``, as is the initialisation, which is PyTorch's default.

    Args:
        init_cfg: Initialisation. None: PyTorch's default.

    Shape: (N, 3, H, W) to a tuple of one (N, 960, H / 8, W / 8).
    """

    groups = 3
    stages = ((240, 4), (480, 8), (960, 4))  # channels, units

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        channels = 24
        self.conv1 = nn.Conv2d(3, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        for index, (width, depth) in enumerate(self.stages, start=1):
            # the stem's few channels are not split into groups
            first = _ShuffleUnit(channels, width - channels, self.groups, stride=2, split_input=index > 1)
            rest = [_ShuffleUnit(width, width, self.groups) for _ in range(depth - 1)]
            self.add_module(f'layer{index}', nn.Sequential(first, *rest))
            channels = width

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        return (self.layer3(self.layer2(self.layer1(x))),)


class _ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; the input is added, or with stride 2 pooled and appended."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, stride: int = 1, split_input: bool = True
    ) -> None:
        super().__init__()
        middle = out_channels // 4
        self.stride = stride
        self.first_groups = groups if split_input else 1
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, out_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(self.relu(self.bn1(self.conv1(x))), self.first_groups)
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return self.relu(torch.cat([out, nn.functional.avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return self.relu(out + x)


@MODELS.register_module()
class CIFARShuffleNetV2(ShuffleNetV2):
    """mmpretrain's ShuffleNetV2 (arXiv 1807.11164) with the stem for 32x32 images that papers on distillation use.

    The stem is a 1x1 convolution that keeps the resolution, without max-pooling. The initialisation is PyTorch's
    default. Source: RepDistiller (arXiv 1910.10699), ``models/ShuffleNetv2.py``.

    Args:
        init_cfg: Initialisation; by default that of PyTorch's convolutions.
        kwargs: As for mmpretrain's ``ShuffleNetV2``.
    """

    def __init__(
        self,
        init_cfg: Any = dict(  # noqa: B006  only read
            type='Kaiming', layer='Conv2d', a=5**0.5, mode='fan_in', nonlinearity='leaky_relu', distribution='uniform'
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg=init_cfg, **kwargs)
        self.conv1 = nn.Sequential(nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.maxpool = nn.Identity()

    def init_weights(self) -> None:
        """Initialise by init_cfg alone; mmpretrain's network would draw its convolutions again from a normal."""
        BaseBackbone.init_weights(self)
