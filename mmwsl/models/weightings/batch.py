"""What a weighting looks at: the logits and targets of one call, and what follows from them.

Each quantity is computed at most once, and only when something asks for it. A loss that has computed one on its way
sets it, and so does whoever knows the teacher's loss better than its logits tell it.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmwsl import functional
from mmwsl.functional import at_least_float32


class SampleBatch:
    r"""Targets with one distribution over classes each, as of a softmax head. Nothing here has a gradient.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices, (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the loss that is weighted.
        ignore_index: An index whose targets do not count.
        data_samples: Of the images, for what is known of each by its ``sample_idx``. Length: N.
    """

    def __init__(self, preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 1.0,
                 ignore_index: int = functional.IGNORE_INDEX, data_samples: Sequence[Any] | None = None) -> None:
        self.preds_S, self.preds_T = preds_S.detach(), preds_T.detach()
        self.tau = tau
        self.data_samples = data_samples
        self.has_classes = not target.is_floating_point()
        """Whether each target has one class; None of them has where class scores are given."""
        self.kept = functional.kept_targets(target, ignore_index)
        r"""Which targets count. Shape: (N, \*)."""
        # off the CPU a look would wait for the device
        self.ignores = self.has_classes and not (self.kept.device.type == 'cpu' and bool(self.kept.all()))
        """Whether a target may be one that does not count."""
        self.dtype = torch.promote_types(self.preds_S.dtype, torch.float32)
        """Of losses and weights."""
        self.masked_weight: Tensor | None = None
        r"""WSL's weight from a loss that is 0, as the weight is, where a target is ignored. Shape: (N, \*)."""
        self.given_target, self.ignore_index = target, ignore_index
        self.applied_teacher_loss: Tensor | None = None
        r"""L_t as a weighting had it from elsewhere, for records; None: as teacher_hard_loss. Shape: (N, \*)."""

    @cached_property
    def target(self) -> Tensor:
        r"""An ignored target is computed as class 0, and then counts nothing. Shape: (N, \*) or (N, C, \*)."""
        target = self.given_target.masked_fill(self.ignored, 0) if self.ignores else self.given_target
        if self.has_classes and target.device.type in functional.REPORTS_LATER:
            functional.assert_classes(target, self.preds_S.shape[1], self.ignore_index)
        return target

    @cached_property
    def ignored(self) -> Tensor:
        r"""Which targets do not count. Shape: (N, \*)."""
        return ~self.kept

    @cached_property
    def student_hard_loss(self) -> Tensor:
        r""":math:`L_s` in nats. Shape: (N, \*)."""
        return self.hard_loss(self.preds_S)

    @cached_property
    def teacher_hard_loss(self) -> Tensor:
        r""":math:`L_t` in nats. Shape: (N, \*)."""
        return self.hard_loss(self.preds_T)

    @cached_property
    def true_prob_difference(self) -> Tensor:
        r"""The true class's probability at temperature tau, student's - teacher's; its expectation for class scores.
        Shape: (N, \*)."""
        probs_S, probs_T = ((at_least_float32(preds) / self.tau).softmax(1) for preds in (self.preds_S, self.preds_T))
        return functional.at_target(probs_S - probs_T, self.target)

    @cached_property
    def wsl_weight(self) -> Tensor:
        r"""WSL's weight, 1 - exp(-L_s / L_t). Shape: (N, \*)."""
        return functional.weight_of_losses(self.student_hard_loss, self.teacher_hard_loss)

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        r"""a and b of :func:`functional.bias_and_variance_gradients`; NaN for class scores. Shape: (N, \*) each."""
        a = torch.expm1(-self.student_hard_loss)
        b = self.tau * self.true_prob_difference - a
        return (a, b) if self.has_classes else (torch.full_like(a, torch.nan), torch.full_like(b, torch.nan))

    @property
    def is_regularization(self) -> Tensor:
        r"""Which targets are regularization samples, \|b\| > \|a\|. Shape: (N, \*)."""
        a, b = self.gradients
        return b.abs() > a.abs()

    @property
    def sample_idx(self) -> Tensor:
        """Each image's place in its dataset. Shape: (N, ).

        Raises:
            ValueError: If the call knows no data samples, or a sample has no ``sample_idx``.
        """
        if self.data_samples is None:
            raise ValueError('this weighting looks images up by their sample_idx, and the loss was given no '
                             'data_samples: use mmwsl.WSLDistiller, or map data_samples to a ModuleInputs recorder of '
                             "the student (source='', data_idx=1)")
        found = [sample.metainfo.get('sample_idx') for sample in self.data_samples]
        if None in found:
            raise ValueError("an image has no sample_idx: keep 'sample_idx' among meta_keys of PackInputs (it is by "
                             'default), and take a dataset of mmengine or mmpretrain')
        return torch.tensor(found, dtype=torch.int64).to(self.kept.device, non_blocking=True)

    def hard_loss(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        r"""Cross-entropy at temperature 1, with another target than the batch's on demand. Shape: (N, \*)."""
        return functional.cross_entropy(at_least_float32(preds), self.target if target is None else target)

    def teachers_target(self) -> Tensor:
        r"""What the teacher would answer: its most likely class. Shape: (N, \*)."""
        return self.preds_T.argmax(1)

    def softness(self, tau: float) -> Tensor:
        r""":math:`\sum_c (p^t_c)^{1/\tau}`. Shape: (N, \*)."""
        return functional.wttm_weight(self.preds_T, tau)

    def entropies(self, tau: float) -> tuple[Tensor, Tensor]:
        r"""Of the student's and the teacher's prediction, in nats. Shape: (N, \*) each."""
        return functional.entropy(self.preds_S, tau), functional.entropy(self.preds_T, tau)

    @property
    def choices(self) -> int:
        """Classes that a target is one of."""
        return self.preds_S.shape[1]

    def replace_teacher_hard_loss(self, losses: Tensor) -> None:
        r"""Have L_t from whoever knows it better than the teacher's logits tell it. Shape: (N, \*)."""
        self.teacher_hard_loss = losses
        vars(self).pop('wsl_weight', None)

    def release(self) -> None:
        """Let go of logits where all that statistics need has been computed, and of data samples."""
        self.data_samples = None
        if {'student_hard_loss', 'teacher_hard_loss', 'true_prob_difference'} <= vars(self).keys():
            self.preds_S = self.preds_T = self.kept.new_empty(0)

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Logits with 0 where the target does not count, so that what is not finite there reaches no gradient.
        Shape: as preds."""
        return functional.without_ignored(preds, self.kept) if self.ignores else preds

    @property
    def count(self) -> int | Tensor:
        """How many targets count, at least 1."""
        return self.kept.sum().clamp(min=1) if self.ignores else max(1, self.kept.numel())

    def mean(self, values: Tensor) -> Tensor:
        """Over the targets that count; 0 where none does. A scalar."""
        kept = self.kept.expand_as(values)
        return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


class BernoulliBatch(SampleBatch):
    r"""Targets with a decision for each class, as of a multi-label head: its logits are (0, z).

    What a :class:`SampleBatch` has once per target this has once per class, (N, C, \*).

    Args:
        preds_S, preds_T, tau, data_samples: As of :class:`SampleBatch`.
        target: Scores of the classes in [0, 1], (N, C, \*), or class indices, (N, \*).
        ignore_index: An index whose targets do not count.
    """

    def __init__(self, preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 1.0,
                 ignore_index: int = functional.IGNORE_INDEX, data_samples: Sequence[Any] | None = None) -> None:
        super().__init__(preds_S, preds_T, target, tau, ignore_index, data_samples)
        if self.has_classes:
            scores = torch.zeros_like(self.preds_S, dtype=self.dtype)
            self.target = scores.scatter_(1, self.target.unsqueeze(1), 1.0)
        self.target = self.target.to(self.dtype)
        self.has_classes = True  # each decision has its outcome
        self.kept, self.ignored = self.kept.unsqueeze(1), self.ignored.unsqueeze(1)

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Logits with 0 where the target does not count. Shape: as preds."""
        return torch.where(self.kept, preds, torch.zeros((), dtype=preds.dtype, device=preds.device))

    @cached_property
    def true_prob_difference(self) -> Tensor:
        r"""The outcome's probability at temperature tau, student's - teacher's. Shape: (N, C, \*)."""
        probs_S, probs_T = ((at_least_float32(preds) / self.tau).sigmoid() for preds in (self.preds_S, self.preds_T))
        return (probs_S - probs_T) * (2 * self.target - 1)

    def hard_loss(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        r"""Binary cross-entropy of each class at temperature 1. Shape: (N, C, \*)."""
        return functional.bernoulli_hard_loss(preds, self.target if target is None else target)

    def teachers_target(self) -> Tensor:
        r"""1 where the teacher says yes, 0 elsewhere. Shape: (N, C, \*)."""
        return (self.preds_T > 0).to(self.target.dtype)

    def softness(self, tau: float) -> Tensor:
        r""":math:`p^{1/\tau} + (1 - p)^{1/\tau}` of the teacher. Shape: (N, C, \*)."""
        preds = at_least_float32(self.preds_T)
        return sum((F.logsigmoid(z) / tau).exp() for z in (preds, -preds))  # type: ignore[return-value]

    def entropies(self, tau: float) -> tuple[Tensor, Tensor]:
        r"""Of the student's and the teacher's decisions, in nats. Shape: (N, C, \*) each."""
        def entropy(preds: Tensor) -> Tensor:
            scaled = at_least_float32(preds) / tau
            return -sum(z.sigmoid() * F.logsigmoid(z) for z in (scaled, -scaled))  # type: ignore[return-value]
        return entropy(self.preds_S), entropy(self.preds_T)

    @property
    def choices(self) -> int:
        """A decision has two."""
        return 2
