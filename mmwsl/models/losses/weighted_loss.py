from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmwsl import functional
from mmwsl.models.losses.base import SampleLoss, Target, build_loss
from mmwsl.models.losses.call import Call
from mmwsl.models.weightings import SampleBatch, SampleWeighting, UniformWeighting, build_weighting
from mmwsl.registry import MODELS

_REDUCTIONS = ('none', 'mean', 'sum')
_AVERAGES = ('targets', 'positives')


@MODELS.register_module()
class WeightedLoss(nn.Module):
    r"""Any loss of one value per target under any weight of one value per target, :math:`\alpha \cdot w_i \, \ell_i`.

    It knows no number of classes, no device and no network, so any distiller of MMRazor can carry it. The hard loss is
    the student's own.

    Args:
        loss: Config of a :class:`SampleLoss`, such as ``dict(type='DKD', tau=4.0)``.
        weighting: Config of a :class:`SampleWeighting`, such as ``dict(type='WSLWeighting')``. None: all weights are 1.
        loss_weight: The paper's alpha.
        ignore_index: Class index whose targets do not count.
        reduction: 'mean' over the targets that are kept (0 where none is), 'sum' or 'none'.
        average: What 'mean' divides by: 'targets' for those that are kept; 'positives' for those of them that have a
            right class and are not background, as detectors count (heads of sigmoids alone).
        sync_divisor: Whether that number is averaged over all processes, so that they train as one process with the
            whole batch would. For targets whose number differs between processes: pixels that are kept, positives.
        warmup_epochs: Epochs of a run of mmengine in which the loss grows evenly to its full weight, with
            1 / warmup_epochs in the first, as in DKD's code. A run by iterations has no epochs, and
            ``mmwsl.CheckTeacherHook`` refuses it.

    Raises:
        TypeError: If loss or weighting is something else.
        ValueError: If loss and weighting do not go together: weights per class of a loss per target, weights of a loss
            that belongs to the batch as a whole, weights per image of a loss per class. If a softmax has no positives.

    Examples:
        >>> loss = WeightedLoss(dict(type='DKD', tau=4.0), dict(type='WSLWeighting'))
        >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
        >>> loss(student, teacher, torch.randint(100, (8, ))).backward()
    """

    def __init__(
        self,
        loss: Any,
        weighting: Any = None,
        loss_weight: float = 1.0,
        ignore_index: int = functional.IGNORE_INDEX,
        reduction: str = 'mean',
        warmup_epochs: int = 0,
        average: str = 'targets',
        sync_divisor: bool = False,
    ) -> None:
        super().__init__()
        self.sample_loss = build_loss(loss)
        self.sample_weighting = build_weighting(weighting or dict(type='UniformWeighting'))
        check_pair(self.sample_loss, self.sample_weighting)
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.reduction = self._checked(reduction)
        if average not in _AVERAGES:
            raise ValueError(f'average should be one of {_AVERAGES}, got {average!r}')
        if average == 'positives' and not self.sample_loss.for_sigmoids:
            raise ValueError(
                f"average='positives' is for heads of sigmoids, and {type(self.sample_loss).__name__} is "
                "for a softmax, in which background is a class like others: take 'targets'"
            )
        self.average, self.sync_divisor = average, sync_divisor
        if not warmup_epochs >= 0:
            raise ValueError(f'warmup_epochs should be at least 0, got {warmup_epochs}')
        self.warmup_epochs = warmup_epochs
        self._share: float | None = None
        self._last = _LastCall()

    def forward(
        self,
        preds_S: Tensor,
        preds_T: Tensor,
        gt_labels: Target,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        teacher_hard_loss: Tensor | None = None,
        data_samples: Sequence[Any] | None = None,
    ) -> Tensor:
        r"""Loss of a batch.

        Args:
            preds_S: Student logits. Shape: (N, C) or (N, C, \*).
            preds_T: Teacher logits. Shape: as preds_S.
            gt_labels: Class indices, (N, \*), or class scores of the logits' shape. What else a loss takes it says.
            weight: A further weight for each target, (N, \*); of a loss per class also for each class, (N, C, \*).
            avg_factor: What the sum is divided by instead of a number of targets; of 0 the loss is 0. Neither
                it nor ``weight`` touches a term of the batch as a whole.
            reduction_override: Replaces ``reduction`` for this call.
            teacher_hard_loss: The teacher's loss of each target at temperature 1, where it is known better than from
                preds_T, as of a teacher cache. Shape: (N, \*).
            data_samples: Of the images, for a weighting that looks them up. Length: N.

        Returns:
            A scalar, or with reduction 'none' one value for each target, (N, \*).

        Raises:
            TypeError: If logits are not floating point, or gt_labels are neither int64 nor floating point.
            ValueError: If shapes do not belong together, an index is not in [0, C), class scores come with a loss or a
                weighting that needs one class for each target or, of a softmax, sum up to more than 1, or avg_factor is
                negative or comes with 'sum'.
        """
        reduction = self._checked(reduction_override or self.reduction)
        self.sample_loss.check(preds_S, preds_T, gt_labels, self.ignore_index)
        batch = self.sample_loss.batch(preds_S, preds_T, gt_labels, self.ignore_index, data_samples)
        if self.sample_weighting.needs_classes and not batch.has_classes:
            raise ValueError(
                f'{type(self.sample_weighting).__name__} needs class indices, got class scores, of which '
                'no class is the true one: leave mixing out, or take another weighting'
            )
        losses = self._losses(preds_S, batch)
        if teacher_hard_loss is not None:
            batch.replace_teacher_hard_loss(_one_per_target(teacher_hard_loss.detach(), losses, 'teacher_hard_loss'))
        weights = self._weights(batch, losses)
        divergence = partial(self.sample_loss.divergence, losses.detach(), batch.preds_T)
        scale = self.loss_weight * self._warmth()
        if batch.ignores and weights is not batch.masked_weight:
            # no products with the mask: where a target is ignored either may be nan
            losses = (losses * (weights.masked_fill(batch.ignored, 0.0) * scale)).masked_fill(batch.ignored, 0.0)
        else:
            losses = losses * (weights * scale)
        if weight is not None and weight.shape == losses.shape:
            losses, weight = losses * weight.to(losses), None
        self._last.call = Call(batch, weights, losses.detach(), divergence)
        if self.sample_loss.per_class:
            losses = losses.sum(1)
        if weight is not None:
            losses = losses * _one_per_target(weight, losses, 'weight')
        if reduction == 'mean' and avg_factor is None:
            total = losses.sum() / self._divisor(batch, losses.dtype)
        else:
            total = _reduce(losses, reduction, avg_factor)
        whole = self.sample_loss.of_the_whole(preds_S, batch)
        return total if whole is None else total + scale * whole

    def _divisor(self, batch: SampleBatch, dtype: torch.dtype) -> int | Tensor:
        """Of a mean: how many targets there are, and where there is none 1."""
        count = batch.positive_targets.sum() if self.average == 'positives' else batch.count  # type: ignore[attr-defined]
        if not self.sync_divisor:
            return max(1, count) if isinstance(count, int) else count.clamp(min=1)
        return over_processes(torch.as_tensor(count, device=batch.kept.device)).to(dtype)

    def _losses(self, preds_S: Tensor, batch: SampleBatch) -> Tensor:
        """Of each target, or of each class of it."""
        losses = self.sample_loss.of_batch(preds_S, batch)
        expected = preds_S.shape if self.sample_loss.per_class else (len(preds_S), *preds_S.shape[2:])
        if losses.shape != expected:
            raise ValueError(
                f'{type(self.sample_loss).__name__} should give losses of shape {tuple(expected)} for '
                f'logits of shape {tuple(preds_S.shape)}, got {tuple(losses.shape)}: one value for each '
                'target, or with per_class=True for each class of it'
            )
        return losses

    def _weights(self, batch: SampleBatch, losses: Tensor) -> Tensor:
        """One for each loss, or one for all classes of a target."""
        with torch.no_grad():
            weights = self.sample_weighting(batch)
        if weights.shape not in (losses.shape, batch.kept.shape):  # it may broadcast, and be wrong without a word
            raise ValueError(
                f'{type(self.sample_weighting).__name__} should give weights of shape '
                f'{tuple(losses.shape)}, one for each loss, got {tuple(weights.shape)}'
            )
        return weights.to(losses)

    def _checked(self, reduction: str) -> str:
        if reduction not in _REDUCTIONS:
            raise ValueError(f'reduction should be one of {_REDUCTIONS}, got {reduction!r}')
        if self.sample_loss.has_term_of_the_whole and reduction != 'mean':
            raise ValueError(
                f"a term of the batch as a whole is a mean, got reduction={reduction!r}: take 'mean', or "
                'leave the term out (of DIST: gamma=0)'
            )
        return reduction

    def prepare(self) -> None:
        """Look up the epoch that ``warmup_epochs`` needs, before a call that torch.compile traces.

        A call does it itself where nobody has, and then breaks the graph.

        Raises:
            RuntimeError: If no run tells the epoch.
        """
        if not self.warmup_epochs:
            return
        epoch = MessageHub.get_current_instance().get_info('epoch')
        if epoch is None:
            raise RuntimeError(
                f'warmup_epochs={self.warmup_epochs} needs to know the epoch, which a run of mmengine '
                'tells: train with its Runner, or set warmup_epochs=0 and scale the loss yourself'
            )
        self._share = min(1.0, (epoch + 1) / self.warmup_epochs)

    def _warmth(self) -> float:
        """Share of the loss's weight in this epoch, in (0, 1]."""
        if not self.warmup_epochs:
            return 1.0
        if self._share is None:
            self.prepare()
        share, self._share = self._share, None  # another step may be in another epoch
        return share  # type: ignore[return-value]

    @property
    def tau(self) -> float:
        """Temperature of the loss."""
        return self.sample_loss.tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self.sample_loss.tau = tau

    @property
    def needs_data_samples(self) -> bool:
        """Whether the weighting looks images up."""
        return self.sample_weighting.needs_data_samples

    @property
    def last_call(self) -> Call | None:
        """What this thread's last forward knew of its targets, without gradient; None before the first."""
        return self._last.call

    @property
    def sample_terms(self) -> dict[str, Tensor]:
        """:meth:`Call.sample_terms` of the last forward; empty before the first."""
        return self._last.call.sample_terms() if self._last.call else {}

    @property
    def statistics(self) -> dict[str, Tensor]:
        """:meth:`Call.statistics` of the last forward; empty before the first."""
        return self._last.call.statistics() if self._last.call else {}

    def extra_repr(self) -> str:
        return (
            f'loss_weight={self.loss_weight}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, '
            f'warmup_epochs={self.warmup_epochs}'
        )


def over_processes(count: Tensor) -> Tensor:
    """Return the mean of a number over all processes, in float64; of 1 in one of them, if all have 0."""
    total = count.to(torch.float64, copy=True)
    all_reduce(total)
    return total.clamp(min=1) / get_world_size()


class _LastCall(threading.local):
    """One for each thread, and none for a copy."""

    call: Call | None = None

    def __reduce__(self) -> tuple:
        return _LastCall, ()


def check_pair(loss: SampleLoss, weighting: SampleWeighting) -> None:
    """Raise ValueError where the weight of a loss is not defined."""
    names = f'{type(loss).__name__} under {type(weighting).__name__}'
    if weighting.per_class and not loss.per_class:
        raise ValueError(
            f'{names} is not defined: the weight is per class, and the loss has one value per target. '
            'Take a weight per target, or a loss per class (BernoulliKD)'
        )
    if weighting.needs_classes and not weighting.per_image and loss.for_sigmoids and not loss.per_class:
        raise ValueError(
            f'{names} is not defined: the weight needs one outcome for each target, and a target of '
            'sigmoids has one for each class. Take another weight, or per_class=True'
        )
    if weighting.per_image and loss.for_sigmoids:
        raise ValueError(
            f'{names} is not defined: the weight looks up one loss per image, and each class of it is '
            'decided by itself. Take the weight from the teacher (without teacher_losses)'
        )
    if not loss.is_weightable and not isinstance(weighting, UniformWeighting):
        raise ValueError(
            f'{names} is not defined: what is left of the loss is a term of the batch as a whole, and no '
            'target has a value of its own. Leave the weighting out'
        )


def _one_per_target(values: Tensor, losses: Tensor, name: str) -> Tensor:
    if values.shape != losses.shape:
        raise ValueError(f'{name} should have one value per target, {tuple(losses.shape)}, got {tuple(values.shape)}')
    return values.to(losses)


def _reduce(losses: Tensor, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    if reduction == 'none':
        return losses
    if reduction == 'sum':
        if avg_factor is not None:
            raise ValueError(f"avg_factor belongs to reduction 'mean', got avg_factor={avg_factor} with 'sum'")
        return losses.sum()
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.to(losses.device)
        return torch.where(avg_factor > 0, losses.sum() / avg_factor.clamp(min=torch.finfo(losses.dtype).tiny), 0.0)
    assert avg_factor is not None
    if avg_factor < 0:
        raise ValueError(f'avg_factor should be at least 0, got {avg_factor}')
    return losses.sum() / avg_factor if avg_factor else losses.sum() * 0.0
