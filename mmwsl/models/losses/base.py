from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmwsl import functional
from mmwsl.models.weightings import SampleBatch
from mmwsl.registry import MODELS

Target = Tensor | tuple[Tensor, Tensor]
"""Class indices or scores; for some losses of sigmoid heads also a pair of indices and the quality of each."""


class SampleLoss(nn.Module):
    r"""Base class of losses with one value for each target.

    To add your own loss, derive from this class, register it in ``mmwsl.registry.MODELS`` and write ``forward``.
    :class:`mmwsl.models.losses.WeightedLoss` checks the arguments before and reduces the result afterwards.
    """

    tau = 1.0
    """Temperature, at which regularization samples are counted and a top K of a teacher cache is restored."""
    per_class = False
    r"""Whether it returns a value for each class of a target, (N, C, \*), as for a sigmoid head."""
    never_vanishes = False
    """Whether the loss stays above 0 for a student that equals its teacher; :meth:`divergence` then reaches 0."""
    needs_classes = False
    """Whether it is undefined for class scores (mixup, cutmix)."""
    batch_type: type[SampleBatch] = SampleBatch
    """Type of the batch that a weighting receives."""

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss of each target, differentiable in preds_S.

        Args:
            preds_S: Student logits. Shape: (N, C, \*).
            preds_T: Teacher logits, without gradient. Shape: (N, C, \*).
            target: Class indices, (N, \*), with 0 for ignored targets; or class scores, (N, C, \*).

        Returns:
            Shape: (N, \*).
        """
        raise NotImplementedError

    def of_batch(self, preds_S: Tensor, batch: SampleBatch) -> Tensor:
        """Compute :meth:`forward` on a batch; intermediate results may be stored there, for a weighting to use."""
        return self(batch.without_ignored(preds_S), batch.without_ignored(batch.preds_T), batch.target)

    def of_the_whole(self, preds_S: Tensor, batch: SampleBatch) -> Tensor | None:
        """Return a further term of the batch as a whole, which cannot be weighted by target. A scalar, or None."""
        return None

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor | None:
        r"""Return the KL divergence to log in place of losses that do not reach 0.

        Args:
            losses: Result of :meth:`forward`, without gradient. Shape: (N, \*).
            preds_T: Teacher logits. Shape: (N, C, \*).

        Returns:
            KL(teacher, student) at temperature tau in nats, shape as losses; None for a loss that reaches 0.
        """
        return None

    @property
    def for_sigmoids(self) -> bool:
        """Whether it is for sigmoid heads, and not for softmax heads."""
        return self.per_class

    @property
    def is_weightable(self) -> bool:
        """Whether it has values of single targets, which can be weighted."""
        return True

    @property
    def has_term_of_the_whole(self) -> bool:
        """Whether :meth:`of_the_whole` returns a value."""
        return False

    def check(self, preds_S: Tensor, preds_T: Tensor, target: Target, ignore_index: int) -> None:
        """Raise TypeError or ValueError if the arguments do not match."""
        if isinstance(target, tuple):
            raise TypeError(
                f'{type(self).__name__} takes class indices or class scores, got a tuple of '
                f'{len(target)}, as from a detector with qualities: use BernoulliKD'
            )
        functional.check_logits(preds_S, preds_T)
        functional.check_target(preds_S, target, ignore_index, later=False)  # batch.target does
        functional.check_single_label(target)
        if self.needs_classes and target.is_floating_point():
            raise ValueError(
                f'{type(self).__name__} needs one class for each target, got class scores (of mixup, '
                'cutmix or a soft label): switch off mixing, or use a loss that is defined for them '
                '(SoftCrossEntropy, DIST, TTM)'
            )

    def batch(
        self,
        preds_S: Tensor,
        preds_T: Tensor,
        target: Target,
        ignore_index: int,
        data_samples: Sequence[Any] | None = None,
    ) -> SampleBatch:
        """Collect the checked arguments that a weighting reads."""
        return self.batch_type(
            preds_S,
            preds_T,
            target,  # type: ignore[arg-type]
            self.tau,
            ignore_index,
            data_samples,
        )


def build_loss(loss: Any) -> SampleLoss:
    """Build a sample loss from its config, whose ``type`` is looked up in mmwsl first; a built loss is returned.

    Raises:
        TypeError: If the result is not a SampleLoss.
    """
    built = MODELS.build({'_scope_': 'mmwsl', **loss}) if isinstance(loss, Mapping) else loss
    if not isinstance(built, SampleLoss):
        raise TypeError(
            f"loss should be the config of a SampleLoss, such as dict(type='DKD'), got "
            f'{type(built).__name__}. docs/pairs.md lists all losses, docs/own_parts.md shows how to write one'
        )
    return built
