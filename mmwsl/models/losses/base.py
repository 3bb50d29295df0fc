from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmwsl import functional
from mmwsl.models.weightings import SampleBatch
from mmwsl.registry import MODELS

Target = Tensor | tuple[Tensor, Tensor]
"""Class indices or scores; or, for some losses of heads of sigmoids, indices and the quality of each."""


class SampleLoss(nn.Module):
    r"""What is weighted: a loss with one value for each target.

    To distil by a loss of one's own, derive from this class, register it in ``mmwsl.registry.MODELS`` and write
    ``forward``. :class:`mmwsl.models.losses.WeightedLoss` has checked the arguments, and reduces the result.
    """

    tau = 1.0
    """Temperature, at which regularization samples are counted and a top K of a teacher cache is restored."""
    per_class = False
    r"""Whether there is a value for each class of a target, (N, C, \*), as for a head of sigmoids."""
    never_vanishes = False
    """Whether a student that answers as its teacher still has a loss; :meth:`divergence` then tells how far it is."""
    needs_classes = False
    """Whether class scores (mixup, cutmix) leave it undefined."""
    batch_type: type[SampleBatch] = SampleBatch
    """What a weighting sees of its targets."""

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Loss of each target, differentiable in preds_S.

        Args:
            preds_S: Student logits. Shape: (N, C, \*).
            preds_T: Teacher logits, without gradient. Shape: (N, C, \*).
            target: Class indices, (N, \*), where what is ignored is of class 0; or class scores, (N, C, \*).

        Returns:
            Shape: (N, \*).
        """
        raise NotImplementedError

    def of_batch(self, preds_S: Tensor, batch: SampleBatch) -> Tensor:
        """As forward; what is computed on the way may be left in the batch, so that a weighting has it for nothing."""
        return self(batch.without_ignored(preds_S), batch.without_ignored(batch.preds_T), batch.target)

    def of_the_whole(self, preds_S: Tensor, batch: SampleBatch) -> Tensor | None:
        """A further term of the batch as a whole, which no target can be weighted by. A scalar, or None."""
        return None

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor | None:
        r"""The KL divergence behind losses that do not reach 0, for the log.

        Args:
            losses: What :meth:`forward` gave, without gradient. Shape: (N, \*).
            preds_T: Teacher logits. Shape: (N, C, \*).

        Returns:
            KL(teacher, student) at temperature tau in nats, shape as losses; None for a loss that reaches 0.
        """
        return None

    @property
    def for_sigmoids(self) -> bool:
        """Whether it is for heads of sigmoids, and not of a softmax."""
        return self.per_class

    @property
    def is_weightable(self) -> bool:
        """Whether there is anything that belongs to single targets."""
        return True

    @property
    def has_term_of_the_whole(self) -> bool:
        """Whether :meth:`of_the_whole` gives a value."""
        return False

    def check(self, preds_S: Tensor, preds_T: Tensor, target: Target, ignore_index: int) -> None:
        """Raise TypeError or ValueError for arguments that do not belong together."""
        if isinstance(target, tuple):
            raise TypeError(
                f'{type(self).__name__} takes class indices or class scores, got a tuple of '
                f'{len(target)}, as of a detector with qualities: take BernoulliKD'
            )
        functional.check_logits(preds_S, preds_T)
        functional.check_target(preds_S, target, ignore_index, later=False)  # batch.target does
        functional.check_single_label(target)
        if self.needs_classes and target.is_floating_point():
            raise ValueError(
                f'{type(self).__name__} needs one class for each target, got class scores (of mixup, '
                'cutmix or a soft label): leave mixing out, or take a loss that is defined for them '
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
        """Of checked arguments, what a weighting looks at."""
        return self.batch_type(
            preds_S,
            preds_T,
            target,  # type: ignore[arg-type]
            self.tau,
            ignore_index,
            data_samples,
        )


def build_loss(loss: Any) -> SampleLoss:
    """A sample loss from its config, whose ``type`` is looked for among mmwsl's first; or the loss itself.

    Raises:
        TypeError: If it is another kind of loss.
    """
    built = MODELS.build({'_scope_': 'mmwsl', **loss}) if isinstance(loss, Mapping) else loss
    if not isinstance(built, SampleLoss):
        raise TypeError(
            f"loss should be the config of a SampleLoss, such as dict(type='DKD'), got "
            f'{type(built).__name__}: docs/pairs.md lists them, docs/own_parts.md shows how to write one'
        )
    return built
