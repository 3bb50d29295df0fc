from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.models.weightings import BernoulliBatch, SampleBatch

_PERCENTILES = range(10, 91, 40)
_SAMPLED = 2**14  # targets that suffice for percentiles: a dense batch has millions


class Call:
    """Results of one call of a loss, without gradient. Statistics are only computed on request.

    Args:
        batch: The targets.
        weight: Weight that was applied to each target, or to each class of it.
        losses: Weighted loss of each target, or of each class of it.
        divergence: Function that computes the KL divergence of each, or None. It holds the teacher's logits until
            :meth:`release`.
    """

    def __init__(
        self, batch: SampleBatch, weight: Tensor, losses: Tensor, divergence: Callable[[], Tensor | None] | None = None
    ) -> None:
        self.batch, self.weight, self.losses = batch, weight, losses
        self.divergence = divergence
        batch.release()

    def release(self) -> None:
        """Free the teacher's logits; ``kl`` is no longer available."""
        self.divergence = None

    def statistics(self) -> dict[str, Tensor]:
        r"""Compute the scalars to log, over the targets that count.

        - ``kl``: mean KL divergence of student and teacher at temperature tau, unweighted and in nats, which a perfect
          student brings to 0. For losses that do not reach 0 themselves, until :meth:`release`.
        - ``wsl_weight``: mean of the applied weight, whatever the weighting.
        - ``wsl_weight_p10``, ``_p50`` and ``_p90``: its percentiles. Of more than 32,767 targets, every k-th is used,
          such that at least 16,384 remain.
        - ``regularization_share``, if each target has one class: share of the targets with \|b\| > \|a\|
          (:func:`mmwsl.functional.bias_and_variance_gradients`).
        - ``wsl_weight_positive`` and ``wsl_weight_negative``, for sigmoid heads: mean weights of the classes that are
          right and of all others.
        - ``negative_share``, for sigmoid heads: share of the latter in the loss, which they may dominate.
        """
        kept = self.batch.kept.expand_as(self.weight)
        kl = self.divergence() if self.divergence else None
        values = {'wsl_weight': self.weight, **({} if kl is None else {'kl': kl})}
        if self.batch.has_classes:
            values['regularization_share'] = self.batch.is_regularization
        means = self.batch.means(values)
        if 'regularization_share' in means:
            means['regularization_share'] = means[
                'regularization_share'
            ].float()  # it is a share of counts, also for float64 logits
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
        r"""Compute the values of each target that sample records hold. Shape: (N, \*) each.

        - ``w``: WSL's weight, whichever was applied.
        - ``L_s`` and ``L_t``: hard losses of student and teacher, in nats; L_t as the weighting used it.
        - ``a`` and ``b``: :func:`mmwsl.functional.bias_and_variance_gradients`, NaN for class scores.
        - ``kept``: whether the target counts.
        """
        a, b = self.batch.gradients
        return dict(**self.weight_terms(), a=a, b=b)

    def weight_terms(self) -> dict[str, Tensor]:
        """Compute ``w``, ``L_s``, ``L_t`` and ``kept`` of :meth:`sample_terms`, which need no pass over the logits."""
        student, teacher = self.batch.student_hard_loss, self.batch.applied_teacher_loss
        if teacher is None:
            teacher = self.batch.teacher_hard_loss
        return dict(w=functional.weight_of_losses(student, teacher), L_s=student, L_t=teacher, kept=self.batch.kept)


def _percentiles(weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Percentiles of the weights that count, by name; 0 if there are none. Nothing waits for the device."""
    step = max(1, weight.numel() // _SAMPLED)
    weight, kept = weight.flatten()[::step], kept.flatten()[::step]
    names = [f'wsl_weight_p{percent}' for percent in _PERCENTILES]
    if not len(weight):
        return dict.fromkeys(names, weight.new_zeros(()))
    ordered = torch.where(kept, weight, torch.inf).sort().values
    last = kept.sum() - 1
    # created on the device, since a list would have to be copied there
    percents = torch.arange(_PERCENTILES.start, _PERCENTILES.stop, _PERCENTILES.step, device=weight.device)
    values = ordered.take((percents * last / 100).round().long())  # with none kept the last, which is infinite like all
    return dict(zip(names, values.nan_to_num(torch.nan, posinf=0.0, neginf=-torch.inf).unbind(), strict=True))
