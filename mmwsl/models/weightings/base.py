from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mmwsl.models.weightings.batch import SampleBatch
from mmwsl.registry import MODELS


class SampleWeighting(nn.Module):
    r"""Base class of weightings: compute a weight for each target, without gradient.

    To add your own weighting, derive from this class, register it in ``mmwsl.registry.MODELS`` and write ``forward``.
    It can use everything in :class:`SampleBatch`: the losses and logits of student and teacher, and the target.
    """

    per_class = False
    r"""Whether it returns a weight for each class of a target, (N, C, \*), which only a loss per class can use."""
    per_image = False
    """Whether it stores one value per image, so that each target has to be an image with one class."""
    needs_classes = False
    """Whether it is undefined for class scores (mixup, cutmix)."""
    needs_data_samples = False
    """Whether it looks up images by their data samples."""

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return the weight of each target; for ignored targets any finite value. Shape: (N, \*)."""
        raise NotImplementedError


def build_weighting(weighting: Any) -> SampleWeighting:
    """Build a weighting from its config, whose ``type`` is looked up in mmwsl first; a built weighting is returned.

    Raises:
        TypeError: If the result is not a SampleWeighting.
    """
    built = MODELS.build({'_scope_': 'mmwsl', **weighting}) if isinstance(weighting, Mapping) else weighting
    if not isinstance(built, SampleWeighting):
        raise TypeError(
            f"weighting should be the config of a SampleWeighting, such as dict(type='WSLWeighting'), got "
            f'{type(built).__name__}. docs/pairs.md lists all weightings, docs/own_parts.md shows how to write one'
        )
    return built


def inherit(weighting: SampleWeighting, parts: Iterable[Any]) -> None:
    """Set the requirements of a weighting that is made of others: whatever any of them needs."""
    parts = list(parts)
    for name in ('per_class', 'per_image', 'needs_classes', 'needs_data_samples'):
        setattr(weighting, name, any(getattr(part, name) for part in parts))
