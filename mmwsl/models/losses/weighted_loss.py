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
    r"""Multiply a loss by a weighting, target by target: :math:`\alpha \cdot w_i \, \ell_i`.

    It does not depend on the number of classes, the device or the network, so any distiller of MMRazor can use it. The
    student's own hard loss is not a part of it.

    Args:
        loss: Config of a :class:`SampleLoss`, such as ``dict(type='DKD', tau=4.0)``.
        weighting: Config of a :class:`mmwsl.models.weightings.SampleWeighting`, such as ``dict(type='WSLWeighting')``.
            None: all weights are 1.
        loss_weight: The paper's alpha.
        ignore_index: Class index whose targets do not count.
        reduction: 'mean' over the targets that count (0 if there are none), 'sum' or 'none'.
        average: Divisor of 'mean': 'targets' is the number of targets that count; 'positives' is the number of those
            that have a right class and are not background, as in detectors (only for sigmoid heads).
        sync_divisor: Whether to average the divisor over all processes, so that they train like one process with the
            whole batch. Use it if the number of targets differs between processes, as with ignored pixels or positives.
        warmup_epochs: Number of epochs of a run of mmengine in which the loss grows evenly to its full weight, starting
            at 1 / warmup_epochs, as in DKD's code. A run by iterations has no epochs, and ``mmwsl.CheckTeacherHook``
            refuses it.

    Raises:
        TypeError: If loss is not a SampleLoss, or weighting is not a SampleWeighting.
        ValueError: If loss and weighting do not match: weights per class for a loss per target, weights for a loss that
            is only a term of the batch as a whole, or weights per image for a loss per class. If average is 'positives'
            for a softmax head.

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
                f"average='positives' is for sigmoid heads, and {type(self.sample_loss).__name__} is "
                "for a softmax, in which background is a class like others: use 'targets'"
            )
        self.average, self.sync_divisor = average, sync_divisor
        if not warmup_epochs >= 0:
            raise ValueError(f'warmup_epochs should be at least 0, got {warmup_epochs}')
        self.warmup_epochs = warmup_epochs
        self._next_warmup: float | None = None
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
        r"""Compute the loss of a batch.

        Args:
            preds_S: Student logits. Shape: (N, C) or (N, C, \*).
            preds_T: Teacher logits. Shape: as preds_S.
            gt_labels: Class indices, (N, \*), or class scores of the logits' shape; some losses document other forms.
            weight: A further weight for each target, (N, \*), or for a loss per class also for each class, (N, C, \*).
            avg_factor: Divisor of the sum, in place of the number of targets; if it is 0, so is the loss. Neither this
                nor ``weight`` affects a term of the batch as a whole.
            reduction_override: Replaces ``reduction`` for this call.
            teacher_hard_loss: The teacher's loss of each target at temperature 1, if it is known more exactly than from
                preds_T, for example from a teacher cache. Shape: (N, \*).
            data_samples: Data samples of the images, for a weighting that looks them up. Length: N.

        Returns:
            A scalar, or with reduction 'none' one value for each target, (N, \*).

        Raises:
            TypeError: If logits are not floating point, or gt_labels are neither int64 nor floating point.
            ValueError: If shapes do not match, an index is not in [0, C), class scores are given to a loss or weighting
                that needs one class for each target or, for a softmax, do not sum to 1, or avg_factor is negative or
                used with 'sum'.
        """
        reduction = self._checked(reduction_override or self.reduction)
        self.sample_loss.check(preds_S, preds_T, gt_labels, self.ignore_index)
        batch = self.sample_loss.batch(preds_S, preds_T, gt_labels, self.ignore_index, data_samples)
        if self.sample_weighting.needs_classes and not batch.has_classes:
            raise ValueError(
                f'{type(self.sample_weighting).__name__} needs class indices, got class scores, which have '
                'no true class: switch off mixing, or use another weighting'
            )
        losses = self._losses(preds_S, batch)
        if teacher_hard_loss is not None:
            batch.replace_teacher_hard_loss(_one_per_target(teacher_hard_loss.detach(), losses, 'teacher_hard_loss'))
        weights = self._weights(batch, losses)
        divergence = partial(self.sample_loss.divergence, losses.detach(), batch.preds_T)
        scale = self.loss_weight * self._warmup()
        if batch.ignores and weights is not batch.masked_weight:
            # masked before and after, since both factors of an ignored target may be nan
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
        """Divisor of a mean: the number of targets, at least 1."""
        count = batch.positive_targets.sum() if self.average == 'positives' else batch.count  # type: ignore[attr-defined]
        if not self.sync_divisor:
            return max(1, count) if isinstance(count, int) else count.clamp(min=1)
        return over_processes(torch.as_tensor(count, device=batch.kept.device)).to(dtype)

    def _losses(self, preds_S: Tensor, batch: SampleBatch) -> Tensor:
        """Loss of each target, or of each class of it."""
        losses = self.sample_loss.of_batch(preds_S, batch)
        expected = preds_S.shape if self.sample_loss.per_class else (len(preds_S), *preds_S.shape[2:])
        if losses.shape != expected:
            raise ValueError(
                f'{type(self.sample_loss).__name__} should return losses of shape {tuple(expected)} for '
                f'logits of shape {tuple(preds_S.shape)}, got {tuple(losses.shape)}: return one value for each '
                'target, or with per_class=True for each class of it'
            )
        return losses

    def _weights(self, batch: SampleBatch, losses: Tensor) -> Tensor:
        """Weight of each loss, or one for all classes of a target."""
        with torch.no_grad():
            weights = self.sample_weighting(batch)
        if weights.shape not in (losses.shape, batch.kept.shape):  # other shapes may broadcast silently
            raise ValueError(
                f'{type(self.sample_weighting).__name__} should return weights of shape '
                f'{tuple(losses.shape)}, one for each loss, got {tuple(weights.shape)}'
            )
        return weights.to(losses)

    def _checked(self, reduction: str) -> str:
        if reduction not in _REDUCTIONS:
            raise ValueError(f'reduction should be one of {_REDUCTIONS}, got {reduction!r}')
        if self.sample_loss.has_term_of_the_whole and reduction != 'mean':
            raise ValueError(
                f"a term of the batch as a whole is a mean, got reduction={reduction!r}: use 'mean', or "
                'switch off the term (gamma=0 in DIST)'
            )
        return reduction

    def prepare(self) -> None:
        """Look up the epoch for ``warmup_epochs``, before a call that torch.compile traces.

        Without it, the call looks up the epoch itself, which breaks the graph.

        Raises:
            RuntimeError: If there is no run of mmengine with epochs.
        """
        if not self.warmup_epochs:
            return
        epoch = MessageHub.get_current_instance().get_info('epoch')
        if epoch is None:
            raise RuntimeError(
                f'warmup_epochs={self.warmup_epochs} needs the epoch of a run of mmengine: train with its '
                'Runner, or set warmup_epochs=0 and scale the loss yourself'
            )
        self._next_warmup = min(1.0, (epoch + 1) / self.warmup_epochs)

    def _warmup(self) -> float:
        """Factor of the loss's weight in this epoch, in (0, 1]."""
        if not self.warmup_epochs:
            return 1.0
        if self._next_warmup is None:
            self.prepare()
        factor, self._next_warmup = self._next_warmup, None  # the next step may be in another epoch
        return factor  # type: ignore[return-value]

    @property
    def tau(self) -> float:
        """Temperature of the loss."""
        return self.sample_loss.tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self.sample_loss.tau = tau

    @property
    def needs_data_samples(self) -> bool:
        """Whether the weighting looks up images by their data samples."""
        return self.sample_weighting.needs_data_samples

    @property
    def last_call(self) -> Call | None:
        """Results of this thread's last forward, without gradient; None before the first."""
        return self._last.call

    @property
    def sample_terms(self) -> dict[str, Tensor]:
        """:meth:`Call.sample_terms` of the last forward; empty before the first one."""
        return self._last.call.sample_terms() if self._last.call else {}

    @property
    def statistics(self) -> dict[str, Tensor]:
        """:meth:`Call.statistics` of the last forward; empty before the first one."""
        return self._last.call.statistics() if self._last.call else {}

    def extra_repr(self) -> str:
        return (
            f'loss_weight={self.loss_weight}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, '
            f'warmup_epochs={self.warmup_epochs}'
        )


def over_processes(count: Tensor) -> Tensor:
    """Return the mean of a number over all processes, in float64; a total of 0 counts as 1."""
    total = count.to(torch.float64, copy=True)
    all_reduce(total)
    return total.clamp(min=1) / get_world_size()


class _LastCall(threading.local):
    """The last call of each thread; copies start without one."""

    call: Call | None = None

    def __reduce__(self) -> tuple:
        return _LastCall, ()


def check_pair(loss: SampleLoss, weighting: SampleWeighting) -> None:
    """Raise ValueError if a loss cannot be weighted by a weighting."""
    names = f'{type(loss).__name__} under {type(weighting).__name__}'
    if weighting.per_class and not loss.per_class:
        raise ValueError(
            f'{names} is not defined: the weight is per class, and the loss has one value per target. '
            'Use a weight per target, or a loss per class (BernoulliKD)'
        )
    if weighting.needs_classes and not weighting.per_image and loss.for_sigmoids and not loss.per_class:
        raise ValueError(
            f'{names} is not defined: the weight needs one outcome for each target, and a target of a '
            'sigmoid head has one for each class. Use another weight, or per_class=True'
        )
    if weighting.per_image and loss.for_sigmoids:
        raise ValueError(
            f'{names} is not defined: the weight looks up one loss per image, and each class of an image is '
            "a separate decision. Compute the weight from the teacher's logits (without teacher_losses)"
        )
    if not loss.is_weightable and not isinstance(weighting, UniformWeighting):
        raise ValueError(
            f'{names} is not defined: the loss is only a term of the batch as a whole, without values of single '
            'targets. Remove the weighting'
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
