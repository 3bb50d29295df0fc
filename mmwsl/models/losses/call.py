from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.models.weightings import BernoulliBatch, SampleBatch

_PERCENTILES = range(10, 91, 40)
_SAMPLED = 2**14  # targets that percentiles are taken of, at most: a dense batch has millions


class Call:
    """What one call of a loss knew of its targets, without gradient. Nothing is computed before it is asked for.

    Args:
        batch: The targets.
        weight: What each was weighted by.
        losses: Weighted loss of each target, or of each class of it.
        divergence: Computes the KL divergence of each, or None. It holds the teacher's logits until :meth:`release`.
    """

    def __init__(
        self, batch: SampleBatch, weight: Tensor, losses: Tensor, divergence: Callable[[], Tensor | None] | None = None
    ) -> None:
        self.batch, self.weight, self.losses = batch, weight, losses
        self.divergence = divergence
        batch.release()

    def release(self) -> None:
        """Let go of the teacher's logits: ``kl`` is known no more."""
        self.divergence = None

    def statistics(self) -> dict[str, Tensor]:
        r"""Scalars to log.

        ``kl``: the mean KL divergence of student and teacher at temperature tau, unweighted and in nats, which a
        perfect student brings to 0; of losses that do not reach 0 themselves, until :meth:`release`;
        ``wsl_weight``: the mean weight that was applied to the targets kept, whatever the weighting;
        ``wsl_weight_p10``, ``_p50`` and ``_p90``: its percentiles, of every k-th of more than 32,767 targets, so that
        at least 16,384 count. ``regularization_share``,
        where each has one class: the share of them with \|b\| > \|a\|
        (:func:`mmwsl.functional.bias_and_variance_gradients`). Of heads of sigmoids, where negatives may swamp the
        rest: ``wsl_weight_positive`` and ``wsl_weight_negative``, the mean weights of classes that are right and of all
        others, and ``negative_share``, the share that the latter have of the loss.
        """
        kept = self.batch.kept.expand_as(self.weight)
        kl = self.divergence() if self.divergence else None
        values = {'wsl_weight': self.weight, **({} if kl is None else {'kl': kl})}
        if self.batch.has_classes:
            values['regularization_share'] = self.batch.is_regularization
        means = self.batch.means(values)
        if 'regularization_share' in means:
            means['regularization_share'] = means['regularization_share'].float()  # of a count, also of float64 logits
        statistics = {'kl': means.pop('kl').clamp(min=0)} if kl is not None else {}  # rounding may leave -1e-7
        statistics.update(wsl_weight=means.pop('wsl_weight'), **_percentiles(self.weight, kept), **means)
        if isinstance(self.batch, BernoulliBatch):
            statistics.update(self._of_signs(self.batch, kept))
        return statistics

    def _of_signs(self, batch: BernoulliBatch, kept: Tensor) -> dict[str, Tensor]:
        positive, negative = kept & batch.is_positive, kept & ~batch.is_positive
        total, negatives = (torch.where(mask, self.losses, 0.0).sum() for mask in (kept, negative))
        weights = {
            f'wsl_weight_{sign}': torch.where(mask, self.weight, 0.0).sum() / mask.sum().clamp(min=1)
            for sign, mask in (('positive', positive), ('negative', negative))
        }
        return {**weights, 'negative_share': torch.where(total > 0, negatives / total, 0.0)}

    def sample_terms(self) -> dict[str, Tensor]:
        r"""Of each target. Shape: (N, \*) each.

        ``w``: its weight by WSL, whichever was applied; ``L_s``, ``L_t``: hard losses of student and teacher, in nats,
        L_t as the weighting had it;
        ``a``, ``b``: :func:`mmwsl.functional.bias_and_variance_gradients`, NaN for class scores; ``kept``: whether it
        counts.
        """
        a, b = self.batch.gradients
        return dict(**self.weight_terms(), a=a, b=b)

    def weight_terms(self) -> dict[str, Tensor]:
        """``w``, ``L_s``, ``L_t`` and ``kept`` of :meth:`sample_terms`, which take no pass over the logits."""
        student, teacher = self.batch.student_hard_loss, self.batch.applied_teacher_loss
        if teacher is None:
            teacher = self.batch.teacher_hard_loss
        return dict(w=functional.weight_of_losses(student, teacher), L_s=student, L_t=teacher, kept=self.batch.kept)


def _percentiles(weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Of the weights kept, by name; 0 where there is none. Nothing waits for the device."""
    step = max(1, weight.numel() // _SAMPLED)
    weight, kept = weight.flatten()[::step], kept.flatten()[::step]
    names = [f'wsl_weight_p{percent}' for percent in _PERCENTILES]
    if not len(weight):
        return dict.fromkeys(names, weight.new_zeros(()))
    ordered = torch.where(kept, weight, torch.inf).sort().values
    last = kept.sum() - 1
    # made on the device, where a list would have to be copied to
    percents = torch.arange(_PERCENTILES.start, _PERCENTILES.stop, _PERCENTILES.step, device=weight.device)
    values = ordered.take((percents * last / 100).round().long())  # of none the last, which is infinite as all are
    return dict(zip(names, values.nan_to_num(torch.nan, posinf=0.0, neginf=-torch.inf).unbind(), strict=True))
