from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mmwsl.models.weightings.batch import SampleBatch
from mmwsl.registry import MODELS


class SampleWeighting(nn.Module):
    r"""By what a loss is weighted: a value for each target, without gradient.

    To weight by a rule of one's own, derive from this class, register it in ``mmwsl.registry.MODELS`` and write
    ``forward``. What it may look at is in :class:`SampleBatch`: student's and teacher's losses, logits, the target.
    """

    per_class = False
    r"""Whether there is a value for each class of a target, (N, C, \*): for losses per class alone."""
    per_image = False
    """Whether it knows one value per image, so that a target has to be an image with one class."""
    needs_classes = False
    """Whether class scores (mixup, cutmix) leave it undefined."""
    needs_data_samples = False
    """Whether it looks images up."""

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Weight of each target; what is ignored may have any finite weight. Shape: (N, \*)."""
        raise NotImplementedError


def build_weighting(weighting: Any) -> SampleWeighting:
    """A weighting from its config, whose ``type`` is looked for among mmwsl's first; or the weighting itself.

    Raises:
        TypeError: If it is something else.
    """
    built = MODELS.build({'_scope_': 'mmwsl', **weighting}) if isinstance(weighting, Mapping) else weighting
    if not isinstance(built, SampleWeighting):
        raise TypeError(
            f"weighting should be the config of a SampleWeighting, such as dict(type='WSLWeighting'), got "
            f'{type(built).__name__}: docs/pairs.md lists them, docs/own_parts.md shows how to write one'
        )
    return built


def inherit(weighting: SampleWeighting, parts: Iterable[Any]) -> None:
    """Let a weighting that is made of others need what any of them needs."""
    parts = list(parts)
    for name in ('per_class', 'per_image', 'needs_classes', 'needs_data_samples'):
        setattr(weighting, name, any(getattr(part, name) for part in parts))
