"""Targets of one call of a loss, with the logits and all quantities that a weighting may use.

Each quantity is computed at most once, when it is first used. A loss that computes one anyway sets it, and so does
code that has a better value of the teacher's loss than its logits give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmwsl import functional
from mmwsl.functional import at_least_float32
from mmwsl.utils.data import sample_indices, to_device


class _Once:
    """functools.cached_property without its lock (until Python 3.12), which makes torch.compile break the graph."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, owner: Any, _: type | None = None) -> Any:
        if owner is None:
            return self
        value = vars(owner)[self.name] = self.compute(owner)
        return value


class SampleBatch:
    r"""Targets with one distribution over classes each, as in a softmax head. Nothing here has a gradient.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices, (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the loss that is weighted.
        ignore_index: Class index whose targets do not count.
        data_samples: Data samples of the images, for weightings that look them up by ``sample_idx``. Length: N.
    """

    def __init__(
        self,
        preds_S: Tensor,
        preds_T: Tensor,
        target: Tensor,
        tau: float = 1.0,
        ignore_index: int = functional.IGNORE_INDEX,
        data_samples: Sequence[Any] | None = None,
    ) -> None:
        self.preds_S, self.preds_T = preds_S.detach(), preds_T.detach()
        self.tau = tau
        self.data_samples = data_samples
        self.has_classes = not target.is_floating_point()
        """Whether each target has one class, and not class scores."""
        self.kept = functional.kept_targets(target, ignore_index)
        r"""Mask of the targets that count. Shape: (N, \*)."""
        self.ignores = self.has_classes and not (functional.may_read_values(self.kept) and bool(self.kept.all()))
        """Whether some targets may be ignored."""
        self.dtype = torch.promote_types(self.preds_S.dtype, torch.float32)
        """Type of losses and weights."""
        self.masked_weight: Tensor | None = None
        r"""WSL's weight, if the loss has computed it as 0 for ignored targets. Shape: (N, \*)."""
        self.given_target, self.ignore_index = target, ignore_index
        self.applied_teacher_loss: Tensor | None = None
        r"""L_t that a weighting used in place of teacher_hard_loss, for sample records; else None. Shape: (N, \*)."""

    @_Once
    def target(self) -> Tensor:
        r"""Target in which ignored ones are replaced by class 0. Shape: (N, \*) or (N, C, \*)."""
        target = self.given_target.masked_fill(self.ignored, 0) if self.ignores else self.given_target
        if self.has_classes and not functional.may_read_values(target):
            functional.assert_classes(target, self.indices, self.ignore_index)
        return target

    @property
    def indices(self) -> int:
        """Number of class indices that a target may have."""
        return self.preds_S.shape[1]

    @_Once
    def ignored(self) -> Tensor:
        r"""Mask of the targets that do not count. Shape: (N, \*)."""
        return ~self.kept

    @_Once
    def student_hard_loss(self) -> Tensor:
        r""":math:`L_s` in nats. Shape: (N, \*)."""
        return self.hard_loss(self.preds_S)

    @_Once
    def teacher_hard_loss(self) -> Tensor:
        r""":math:`L_t` in nats. Shape: (N, \*)."""
        return self.hard_loss(self.preds_T)

    @_Once
    def true_prob_difference(self) -> Tensor:
        r"""Student's minus teacher's probability of the true class at temperature tau; its expectation for class
        scores. Shape: (N, \*)."""
        probs_S, probs_T = ((at_least_float32(preds) / self.tau).softmax(1) for preds in (self.preds_S, self.preds_T))
        return functional.at_target(probs_S - probs_T, self.target)

    @_Once
    def wsl_weight(self) -> Tensor:
        r"""WSL's weight, 1 - exp(-L_s / L_t). Shape: (N, \*)."""
        return functional.weight_of_losses(self.student_hard_loss, self.teacher_hard_loss)

    @_Once
    def gradients(self) -> tuple[Tensor, Tensor]:
        r"""a and b of :func:`mmwsl.functional.bias_and_variance_gradients`, NaN for class scores.
        Shape: (N, \*) each."""
        a = torch.expm1(-self.student_hard_loss)
        b = self.tau * self.true_prob_difference - a
        return (a, b) if self.has_classes else (torch.full_like(a, torch.nan), torch.full_like(b, torch.nan))

    @property
    def is_regularization(self) -> Tensor:
        r"""Mask of the regularization samples, \|b\| > \|a\|. Shape: (N, \*)."""
        a = torch.expm1(-self.student_hard_loss)
        return torch.sub(a, self.true_prob_difference, alpha=self.tau).abs() > a.abs()  # |b| with one operation fewer

    @property
    def sample_idx(self) -> Tensor:
        """Index of each image in its dataset. Shape: (N, ).

        Raises:
            ValueError: If the loss received no data samples, or a sample has no ``sample_idx``.
        """
        if self.data_samples is None:
            raise ValueError(
                'this weighting looks up images by their sample_idx, and the loss received no '
                'data_samples: use mmwsl.WSLDistiller, or map data_samples to a ModuleInputs recorder of '
                "the student (source='', data_idx=1)"
            )
        found = sample_indices(self.data_samples)
        if found and isinstance(found[0], Tensor):  # in batches made on the device
            return torch.stack(found)
        return to_device(torch.tensor(found, dtype=torch.int64), self.kept.device)

    def hard_loss(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        r"""Return the cross-entropy at temperature 1, by default with the batch's target. Shape: (N, \*)."""
        return functional.cross_entropy(at_least_float32(preds), self.target if target is None else target)

    def teachers_target(self) -> Tensor:
        r"""Return the teacher's prediction as a target: its most likely class. Shape: (N, \*)."""
        return self.preds_T.argmax(1)

    def softness(self, tau: float) -> Tensor:
        r"""Return the teacher's power sum :math:`\sum_c (p^t_c)^{1/\tau}`. Shape: (N, \*)."""
        return functional.wttm_weight(self.preds_T, tau)

    def entropies(self, tau: float) -> tuple[Tensor, Tensor]:
        r"""Return the entropies of the student's and the teacher's prediction, in nats. Shape: (N, \*) each."""
        return functional.entropy(self.preds_S, tau), functional.entropy(self.preds_T, tau)

    @property
    def choices(self) -> int:
        """Number of outcomes among which a prediction chooses: the classes."""
        return self.preds_S.shape[1]

    def replace_teacher_hard_loss(self, losses: Tensor) -> None:
        r"""Set L_t to values that are better than those from the teacher's logits. Shape: (N, \*)."""
        self.teacher_hard_loss = losses
        vars(self).pop('wsl_weight', None)

    def release(self) -> None:
        """Free the data samples, and the logits if everything that statistics need has been computed."""
        self.data_samples = None
        # one by one: dynamo of torch 2.11 cannot compare with the keys of an object's dict
        if all(name in vars(self) for name in ('student_hard_loss', 'teacher_hard_loss', 'true_prob_difference')):
            self.preds_S = self.preds_T = self.kept.new_empty(0)

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Return logits with 0 for ignored targets, so that non-finite values there reach no gradient.
        Shape: as preds."""
        return functional.without_ignored(preds, self.kept) if self.ignores else preds

    @property
    def count(self) -> int | Tensor:
        """Number of targets that count."""
        return self.kept.sum() if self.ignores else self.kept.numel()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the targets that count, or 0 if there are none. A scalar."""
        kept = self.kept.expand_as(values)
        return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each value over the targets that count, or 0 if there are none, in a few joint operations.

        Args:
            values: Values of the targets, or of the classes of each, by name.
        """
        stacked = torch.stack(torch.broadcast_tensors(*values.values()))
        kept = self.kept.expand(stacked.shape[1:])
        means = torch.where(kept, stacked, 0.0).flatten(1).sum(1) / kept.sum().clamp(min=1)
        return dict(zip(values, means.unbind(), strict=True))


class BernoulliBatch(SampleBatch):
    r"""Targets with a decision for each class, with logits (0, z), as in a multi-label head or a detector.

    All quantities that a :class:`SampleBatch` has once per target are computed once per class, (N, C, \*).

    Args:
        preds_S, preds_T, tau, data_samples: As for :class:`SampleBatch`.
        target: As for :class:`mmwsl.models.losses.BernoulliKD`.
        ignore_index: Class index whose targets do not count.
    """

    def __init__(
        self,
        preds_S: Tensor,
        preds_T: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        tau: float = 1.0,
        ignore_index: int = functional.IGNORE_INDEX,
        data_samples: Sequence[Any] | None = None,
    ) -> None:
        labels, quality = target if isinstance(target, tuple) else (target, None)
        super().__init__(preds_S, preds_T, labels, tau, ignore_index, data_samples)
        if self.has_classes:
            self.positive_targets = self.kept & (labels < self.preds_S.shape[1])
            self.target = functional.label_scores(self.target, self.preds_S.shape[1], quality)
        else:
            self.positive_targets = (labels > 0).any(1)
        self.target = self.target.to(self.dtype)
        self.has_classes = True  # each decision has one outcome
        self.kept, self.ignored = self.kept.unsqueeze(1), self.ignored.unsqueeze(1)

    positive_targets: Tensor
    r"""Mask of the targets with a class whose score is above 0; the others are background. Shape: (N, \*)."""

    @property
    def indices(self) -> int:
        """Number of class indices that a target may have: the classes and background."""
        return self.preds_S.shape[1] + 1

    @property
    def is_positive(self) -> Tensor:
        r"""Mask of the decisions whose class has a score above 0. Shape: (N, C, \*)."""
        return self.target > 0

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Return logits with 0 for ignored targets. Shape: as preds."""
        return torch.where(self.kept, preds, torch.zeros((), dtype=preds.dtype, device=preds.device))

    @_Once
    def true_prob_difference(self) -> Tensor:
        r"""Student's minus teacher's probability of the outcome at temperature tau. Shape: (N, C, \*)."""
        probs_S, probs_T = ((at_least_float32(preds) / self.tau).sigmoid() for preds in (self.preds_S, self.preds_T))
        return (probs_S - probs_T) * (2 * self.target - 1)

    def hard_loss(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        r"""Return the binary cross-entropy of each class at temperature 1. Shape: (N, C, \*)."""
        return functional.bernoulli_hard_loss(preds, self.target if target is None else target)

    def teachers_target(self) -> Tensor:
        r"""Return the teacher's decisions as a target: 1 for a probability above 0.5, else 0. Shape: (N, C, \*)."""
        return (self.preds_T > 0).to(self.target.dtype)

    def softness(self, tau: float) -> Tensor:
        r"""Return the teacher's power sum of each decision, :math:`p^{1/\tau} + (1 - p)^{1/\tau}`.
        Shape: (N, C, \*)."""
        preds = at_least_float32(self.preds_T)
        return sum((F.logsigmoid(z) / tau).exp() for z in (preds, -preds))  # type: ignore[return-value]

    def entropies(self, tau: float) -> tuple[Tensor, Tensor]:
        r"""Return the entropies of the student's and the teacher's decisions, in nats. Shape: (N, C, \*) each."""

        def entropy(preds: Tensor) -> Tensor:
            scaled = at_least_float32(preds) / tau
            return -sum(z.sigmoid() * F.logsigmoid(z) for z in (scaled, -scaled))  # type: ignore[return-value]

        return entropy(self.preds_S), entropy(self.preds_T)

    @property
    def choices(self) -> int:
        """Number of outcomes of a decision."""
        return 2


class JointBernoulliBatch(BernoulliBatch):
    r"""Targets with several decisions that share one weight: each quantity is summed over the decisions, (N, \*)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_classes = False  # a target has several outcomes
        self.kept, self.ignored = self.kept.squeeze(1), self.ignored.squeeze(1)

    @property
    def is_positive(self) -> Tensor:
        r"""Mask of the targets with a class whose score is above 0. Shape: (N, \*)."""
        return self.positive_targets

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Return logits with 0 for ignored targets. Shape: as preds."""
        return functional.without_ignored(preds, self.kept)

    @_Once
    def true_prob_difference(self) -> Tensor:
        """NaN, since it is not defined for several outcomes. Shape: (N, *)."""
        return torch.full_like(self.student_hard_loss, torch.nan)

    def hard_loss(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        r"""Return the sum of the classes' binary cross-entropies. Shape: (N, \*)."""
        return super().hard_loss(preds, target).sum(1)

    def softness(self, tau: float) -> Tensor:
        r"""Return the sum of the decisions' power sums. Shape: (N, \*)."""
        return super().softness(tau).sum(1)

    def entropies(self, tau: float) -> tuple[Tensor, Tensor]:
        r"""Return the entropies of all decisions, summed since these are independent. Shape: (N, \*) each."""
        entropy_S, entropy_T = super().entropies(tau)
        return entropy_S.sum(1), entropy_T.sum(1)

    @property
    def choices(self) -> int:
        """Number of joint outcomes of all decisions."""
        return 2 ** self.target.shape[1]
