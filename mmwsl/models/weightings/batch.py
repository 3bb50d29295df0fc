"""What a weighting looks at: the logits and targets of one call, and what follows from them.

Each quantity is computed at most once, and only when something asks for it. A loss that has computed one on its way
sets it, and so does whoever knows the teacher's loss better than its logits tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmwsl import functional
from mmwsl.functional import at_least_float32
from mmwsl.utils.data import to_device


class _Once:
    """As functools.cached_property, without its lock (until Python 3.12), at which torch.compile breaks the graph."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, owner: Any, _: type | None = None) -> Any:
        if owner is None:
            return self
        value = vars(owner)[self.name] = self.compute(owner)
        return value


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
        """Whether each target has one class; None of them has where class scores are given."""
        self.kept = functional.kept_targets(target, ignore_index)
        r"""Which targets count. Shape: (N, \*)."""
        self.ignores = self.has_classes and not (functional.may_read_values(self.kept) and bool(self.kept.all()))
        """Whether a target may be one that does not count."""
        self.dtype = torch.promote_types(self.preds_S.dtype, torch.float32)
        """Of losses and weights."""
        self.masked_weight: Tensor | None = None
        r"""WSL's weight from a loss that is 0, as the weight is, where a target is ignored. Shape: (N, \*)."""
        self.given_target, self.ignore_index = target, ignore_index
        self.applied_teacher_loss: Tensor | None = None
        r"""L_t as a weighting had it from elsewhere, for records; None: as teacher_hard_loss. Shape: (N, \*)."""

    @_Once
    def target(self) -> Tensor:
        r"""An ignored target is computed as class 0, and then counts nothing. Shape: (N, \*) or (N, C, \*)."""
        target = self.given_target.masked_fill(self.ignored, 0) if self.ignores else self.given_target
        if self.has_classes and not functional.may_read_values(target):
            functional.assert_classes(target, self.indices, self.ignore_index)
        return target

    @property
    def indices(self) -> int:
        """How many class indices there are for a target."""
        return self.preds_S.shape[1]

    @_Once
    def ignored(self) -> Tensor:
        r"""Which targets do not count. Shape: (N, \*)."""
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
        r"""The true class's probability at temperature tau, student's - teacher's; its expectation for class scores.
        Shape: (N, \*)."""
        probs_S, probs_T = ((at_least_float32(preds) / self.tau).softmax(1) for preds in (self.preds_S, self.preds_T))
        return functional.at_target(probs_S - probs_T, self.target)

    @_Once
    def wsl_weight(self) -> Tensor:
        r"""WSL's weight, 1 - exp(-L_s / L_t). Shape: (N, \*)."""
        return functional.weight_of_losses(self.student_hard_loss, self.teacher_hard_loss)

    @_Once
    def gradients(self) -> tuple[Tensor, Tensor]:
        r"""a and b of :func:`functional.bias_and_variance_gradients`; NaN for class scores. Shape: (N, \*) each."""
        a = torch.expm1(-self.student_hard_loss)
        b = self.tau * self.true_prob_difference - a
        return (a, b) if self.has_classes else (torch.full_like(a, torch.nan), torch.full_like(b, torch.nan))

    @property
    def is_regularization(self) -> Tensor:
        r"""Which targets are regularization samples, \|b\| > \|a\|. Shape: (N, \*)."""
        a = torch.expm1(-self.student_hard_loss)
        return torch.sub(a, self.true_prob_difference, alpha=self.tau).abs() > a.abs()  # |b|, an operation less

    @property
    def sample_idx(self) -> Tensor:
        """Each image's place in its dataset. Shape: (N, ).

        Raises:
            ValueError: If the call knows no data samples, or a sample has no ``sample_idx``.
        """
        if self.data_samples is None:
            raise ValueError(
                'this weighting looks images up by their sample_idx, and the loss was given no '
                'data_samples: use mmwsl.WSLDistiller, or map data_samples to a ModuleInputs recorder of '
                "the student (source='', data_idx=1)"
            )
        found = [sample.metainfo.get('sample_idx') for sample in self.data_samples]
        if None in found:
            raise ValueError(
                "an image has no sample_idx: keep 'sample_idx' among meta_keys of PackInputs (it is by "
                'default), and take a dataset of mmengine or mmpretrain'
            )
        if found and isinstance(found[0], Tensor):  # of batches made on the device
            return torch.stack(found)
        return to_device(torch.tensor(found, dtype=torch.int64), self.kept.device)

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
        # one by one: dynamo of torch 2.11 does not know the keys of an object
        if all(name in vars(self) for name in ('student_hard_loss', 'teacher_hard_loss', 'true_prob_difference')):
            self.preds_S = self.preds_T = self.kept.new_empty(0)

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Logits with 0 where the target does not count, so that what is not finite there reaches no gradient.
        Shape: as preds."""
        return functional.without_ignored(preds, self.kept) if self.ignores else preds

    @property
    def count(self) -> int | Tensor:
        """How many targets count."""
        return self.kept.sum() if self.ignores else self.kept.numel()

    def mean(self, values: Tensor) -> Tensor:
        """Over the targets that count; 0 where none does. A scalar."""
        kept = self.kept.expand_as(values)
        return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean of each value over the targets that count, 0 where none does; all by the same few operations.

        Args:
            values: Of the targets, or of the classes of each, by name.
        """
        stacked = torch.stack(torch.broadcast_tensors(*values.values()))
        kept = self.kept.expand(stacked.shape[1:])
        means = torch.where(kept, stacked, 0.0).flatten(1).sum(1) / kept.sum().clamp(min=1)
        return dict(zip(values, means.unbind(), strict=True))


class BernoulliBatch(SampleBatch):
    r"""Targets with a decision for each class, as of a multi-label head or a detector: its logits are (0, z).

    What a :class:`SampleBatch` has once per target this has once per class, (N, C, \*).

    Args:
        preds_S, preds_T, tau, data_samples: As of :class:`SampleBatch`.
        target: As of :class:`mmwsl.models.losses.BernoulliKD`.
        ignore_index: An index whose targets do not count.
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
        self.has_classes = True  # each decision has its outcome
        self.kept, self.ignored = self.kept.unsqueeze(1), self.ignored.unsqueeze(1)

    positive_targets: Tensor
    r"""Which targets have a class that is right, if only in part; the others are background. Shape: (N, \*)."""

    @property
    def indices(self) -> int:
        """Background is one more than the classes."""
        return self.preds_S.shape[1] + 1

    @property
    def is_positive(self) -> Tensor:
        r"""For each weight, whether what it weights has a class that is right. Shape: (N, C, \*)."""
        return self.target > 0

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Logits with 0 where the target does not count. Shape: as preds."""
        return torch.where(self.kept, preds, torch.zeros((), dtype=preds.dtype, device=preds.device))

    @_Once
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


class JointBernoulliBatch(BernoulliBatch):
    r"""The same targets with one weight for all their decisions: what is known of these is summed, (N, \*)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_classes = False  # one target has several outcomes
        self.kept, self.ignored = self.kept.squeeze(1), self.ignored.squeeze(1)

    @property
    def is_positive(self) -> Tensor:
        r"""Shape: (N, \*)."""
        return self.positive_targets

    def without_ignored(self, preds: Tensor) -> Tensor:
        """Shape: as preds."""
        return functional.without_ignored(preds, self.kept)

    @_Once
    def true_prob_difference(self) -> Tensor:
        """Not defined: NaN. Shape: (N, *)."""
        return torch.full_like(self.student_hard_loss, torch.nan)

    def hard_loss(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        r"""Sum of the classes' binary cross-entropies. Shape: (N, \*)."""
        return super().hard_loss(preds, target).sum(1)

    def softness(self, tau: float) -> Tensor:
        r"""Shape: (N, \*)."""
        return super().softness(tau).sum(1)

    def entropies(self, tau: float) -> tuple[Tensor, Tensor]:
        r"""Of independent decisions, so their sum. Shape: (N, \*) each."""
        entropy_S, entropy_T = super().entropies(tau)
        return entropy_S.sum(1), entropy_T.sum(1)

    @property
    def choices(self) -> int:
        """Answers to all decisions."""
        return 2 ** self.target.shape[1]
