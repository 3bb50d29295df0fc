from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import VGG
from torch import nn

from mmwsl.registry import MODELS


@MODELS.register_module()
class CIFARVGG(VGG):
    """VGG for 32x32 images as used in papers on distillation: five stages with BatchNorm, pooled three times.

    mmpretrain's ``VGG`` has as many parameters and pools five times, down to 1x1. This one leaves out the last two
    poolings and outputs 512 channels at 1/8 of the input's size, for global average pooling and a single linear
    classifier. Source: RepDistiller (arXiv 1910.10699), ``models/vgg.py``.

    Args:
        depth: 8 (one convolution per stage), or 11, 13, 16 and 19 as in the VGG paper, which counts three classifier
            layers although only one remains here.
        norm_cfg: Config of the norm layers.
        kwargs: As for mmpretrain's ``VGG``.
    """

    arch_settings = {8: (1, 1, 1, 1, 1), **VGG.arch_settings}

    def __init__(self, depth: int, norm_cfg: dict | None = None, **kwargs: Any) -> None:
        super().__init__(depth, norm_cfg=norm_cfg or dict(type='BN'), with_last_pool=False, **kwargs)
        last_of_stage4 = self.range_sub_modules[3][1] - 1
        self.features[last_of_stage4] = nn.Identity()
