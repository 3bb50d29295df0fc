from __future__ import annotations

from collections.abc import Sequence

from mmpretrain.models.backbones.base_backbone import BaseBackbone
from torch import Tensor, nn

from mmwsl.registry import MODELS


@MODELS.register_module()
class CIFARMobileNetV2(BaseBackbone):
    """MobileNetV2 for 32x32 images as used in papers on distillation, at half its width.

    It is not a narrower MobileNetV2 (arXiv 1801.04381), which mmpretrain and timm have: channels are not rounded to
    multiples of eight, the first block has an expansion (by 1), the second stage keeps the resolution, and activations
    are ReLU. Keys and initialisation are those of the source, RepDistiller (arXiv 1910.10699),
    ``models/mobilenetv2.py``.

    Args:
        widen_factor: Factor of all channels; the last layer has at least 1280.
        init_cfg: Initialisation.

    Shape: (N, 3, H, W) to a tuple of one (N, 1280, H / 16, W / 16).
    """

    # expansion, channels, blocks, stride of the first block
    arch_settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self,
        widen_factor: float = 0.5,
        init_cfg: dict | Sequence[dict] | None = (
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer='BatchNorm2d'),
        ),
    ) -> None:
        super().__init__(list(init_cfg) if isinstance(init_cfg, tuple) else init_cfg)
        channels = int(32 * widen_factor)
        self.conv1 = nn.Sequential(*_conv_bn(3, channels, 3, stride=2), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        for expansion, width, depth, stride in self.arch_settings:
            out_channels = int(width * widen_factor)
            stage = [_InvertedResidual(channels, out_channels, stride, expansion)]
            stage += [_InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(nn.Sequential(*stage))
            channels = out_channels
        last = int(1280 * max(widen_factor, 1.0))
        self.conv2 = nn.Sequential(*_conv_bn(channels, last, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return (self.conv2(x),)


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added if the shape stays the same."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_conv_bn(in_channels, hidden, 1),
            nn.ReLU(inplace=True),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(inplace=True),
            *_conv_bn(hidden, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]
