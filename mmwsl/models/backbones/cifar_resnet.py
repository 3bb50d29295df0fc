from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR
from torch import Tensor, nn
from torch.nn import functional as F

from mmwsl.registry import MODELS


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """The three-stage ResNet of He et al. for 32x32 images (arXiv 1512.03385, Sec. 4.2), of depth 6n + 2.

    mmpretrain's ``ResNet_CIFAR`` is the four-stage ImageNet network with another stem. This is the one that papers call
    ResNet-20 or ResNet-56, with the same keys. With stem_channels 32 and base_channels 64 it is their "x4".

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110 and so on.
        stem_channels: Channels of the stem.
        base_channels: Channels of the first stage; each further stage doubles them.
        out_indices: Stages whose output is returned.
        zero_init_residual: Whether to initialise the last norm layer of each block to zero, which most code does not.
        shortcut: Shortcut of a block that changes the shape: 'conv' (option B, as in most code) is a 1x1 convolution;
            'pad' (option A, as in the paper on CIFAR) skips every other pixel and adds channels of zeros on both sides,
            as in akamaster/pytorch_resnet_cifar10.
        kwargs: As for mmpretrain's ``ResNet``.

    Raises:
        ValueError: If ``shortcut`` is neither 'conv' nor 'pad'.
    """

    arch_settings = {6 * n + 2: (BasicBlock, (n, n, n)) for n in range(1, 201)}

    def __init__(
        self,
        depth: int,
        stem_channels: int = 16,
        base_channels: int = 16,
        out_indices: Sequence[int] = (2,),
        zero_init_residual: bool = False,
        shortcut: str = 'conv',
        **kwargs: Any,
    ) -> None:
        if shortcut not in ('conv', 'pad'):
            raise ValueError(f"shortcut should be 'conv' or 'pad', got {shortcut!r}")
        super().__init__(
            depth,
            stem_channels=stem_channels,
            base_channels=base_channels,
            out_indices=out_indices,
            zero_init_residual=zero_init_residual,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            **kwargs,
        )
        for block in (block for name in self.res_layers for block in getattr(self, name)):
            if shortcut == 'pad' and block.downsample is not None:
                block.downsample = _PadShortcut(block.out_channels - block.in_channels, block.conv1.stride[0])


class _PadShortcut(nn.Module):
    """Shortcut without parameters: every stride-th pixel, between channels of zeros."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, (added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.channels))
