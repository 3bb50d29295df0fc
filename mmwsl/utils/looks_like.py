"""Describe a file of weights in words, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_CLASSIFIER = re.compile(r'(^|\.)(fc|linear|classifier(\.\d+)?|head(\.fc|\.layers\.head|\.\d+)?)\.weight$')


def looks_like(weights: Mapping[str, Tensor]) -> str:
    """Return a network's kind, depth and number of classes in words, as far as names and shapes tell.

    Args:
        weights: A state dict, under mmpretrain's or other code's names.

    Returns:
        E.g. "a CIFAR ResNet of depth 56 with 100 classes", or, for an unknown kind, "a network of 52 convolutions
        with 32 to 1280 channels, and 10 classes".
    """
    heads = [value.shape[0] for key, value in weights.items() if _CLASSIFIER.search(key) and value.dim() == 2]
    known = _resnet(weights) or _transformer(weights)
    if not known and (widths := [value.shape[0] for value in weights.values() if value.dim() == 4]):
        return f'a network of {len(widths)} convolutions with {min(widths)} to {max(widths)} channels' + (
            f', and {heads[-1]} classes' if heads else ''
        )
    return (known or 'a network') + (f' with {heads[-1]} classes' if heads else '')


def _resnet(weights: Mapping[str, Tensor]) -> str:
    blocks = {found.groups() for key in weights if (found := _block(key))}
    stages = {stage for stage, _ in blocks}
    depthwise = any(key.endswith('conv2.weight') and value.shape[1] == 1 for key, value in weights.items())
    if len(stages) not in (3, 4) or depthwise or any(re.search(r'branch|attn', key) for key in weights):
        return ''
    convolutions = {int(found[1]) for key in weights if _block(key) and (found := re.search(r'\.conv(\d)\.', key))}
    first = [
        value.shape[0] for key, value in weights.items() if re.search(r'(layer|block)1\.(layer\.)?0\.conv1\.w', key)
    ]
    if not first or max(convolutions) > 3:
        return ''
    wide = any(re.search(r'(convShortcut|downsample)\.weight$', key) for key in weights)
    depth = max(convolutions) * len(blocks) + (4 if wide else 2)
    width = first[0] // 16
    kind = 'WideResNet' if wide else 'CIFAR ResNet' if len(stages) == 3 else 'ResNet'
    return f'a {kind} of depth {depth}' + (f' and width {width}' if len(stages) == 3 and (wide or width > 1) else '')


def _block(key: str) -> re.Match | None:
    """Match the stage and place of a residual block in a key."""
    return re.search(r'(?:^|\.)(?:layer|block)(\d)\.(?:layer\.)?(\d+)\.(?:conv|bn|gn|downsample|shortcut)', key)


def _transformer(weights: Mapping[str, Tensor]) -> str:
    layers = {key[: key.index('.attn.')] for key in weights if '.attn.' in key}
    return f'a vision transformer of {len(layers)} layers' if layers else ''
