"""Losses on the logits of student and teacher, with one value for each target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.models.losses.base import SampleLoss, Target, build_loss
from mmwsl.models.losses.fused import Terms, kernel_module, kernel_takes, kernel_terms, soft_terms
from mmwsl.models.weightings import BernoulliBatch, JointBernoulliBatch, SampleBatch
from mmwsl.registry import MODELS


class _Tempered(SampleLoss):
    """Base class of losses with a temperature."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        functional.check_temperature(tau)
        self.tau = tau

    def extra_repr(self) -> str:
        return f'tau={self.tau}'


@MODELS.register_module()
class SoftCrossEntropy(_Tempered):
    r"""Knowledge distillation, :math:`\tau^2 H(\sigma(z_t / \tau), \sigma(z_s / \tau))` (arXiv 1503.02531).

    It is the cross-entropy, not the KL divergence: the gradient is the same, and the value is larger by the teacher's
    entropy.

    Args:
        tau: Temperature of the soft labels, above 0.
        compile: True lets torch.compile fuse the passes over the logits into one kernel. This is meant for GPUs, where
            each pass reads all logits again, and makes the first batch slow; a CPU gains little. 'triton' uses kernels
            written by hand instead, for class indices and logits of at most 32 bits, with fewer calls and no other
            memory than one tensor of the logits' size for the gradient. It needs the extra ``triton`` and a GPU, and
            changes nothing on a CPU.

    Raises:
        ValueError: If compile is none of these.
        ImportError: If Triton is missing.

    Examples:
        >>> import torch
        >>> SoftCrossEntropy(tau=1.0)(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))  # ln 2
        tensor([0.6931])
    """

    never_vanishes = True

    def __init__(self, tau: float = 4.0, compile: bool | str = False) -> None:
        super().__init__(tau)
        if compile not in (False, True, 'triton'):
            raise ValueError(f"compile should be False, True or 'triton', got {compile!r}")
        if compile == 'triton':
            kernel_module()
        self.compile_terms = compile  # nn.Module.compile is a method

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss of each target. Shape: (N, \*)."""
        if self._uses_kernel(preds_S, preds_T, target):
            return kernel_terms(preds_S, preds_T, target, self.tau, functional.IGNORE_INDEX).soft_loss
        return soft_terms(preds_S, preds_T, target, self.tau, self._compiles(preds_S)).soft_loss

    def of_batch(self, preds_S: Tensor, batch: SampleBatch) -> Tensor:
        """Compute :meth:`forward`; the same passes over the logits also give the losses that the weight needs."""
        terms = self._terms(preds_S, batch)
        batch.student_hard_loss, batch.teacher_hard_loss = terms.student_hard_loss, terms.teacher_hard_loss
        batch.true_prob_difference = terms.true_prob_difference
        if terms.wsl_weight is not None:
            batch.wsl_weight = batch.masked_weight = terms.wsl_weight
        return terms.soft_loss

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor:
        r"""Subtract the teacher's entropy from the cross-entropy. Shape: (N, \*)."""
        probs_T = (functional.at_least_float32(preds_T) / self.tau).softmax(1)
        return torch.sub(losses, torch.special.entr(probs_T).sum(1), alpha=self.tau**2) / self.tau**2

    def _terms(self, preds_S: Tensor, batch: SampleBatch) -> Terms:
        if self._uses_kernel(preds_S, batch.preds_T, batch.given_target):
            return kernel_terms(preds_S, batch.preds_T, batch.given_target, self.tau, batch.ignore_index)
        return soft_terms(
            preds_S,
            batch.preds_T,
            batch.target,
            self.tau,
            self._compiles(preds_S),
            batch.ignored if batch.ignores else None,
        )

    def _uses_kernel(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> bool:
        return self.compile_terms == 'triton' and kernel_takes(preds_S, preds_T, target)

    def _compiles(self, preds_S: Tensor) -> bool:
        """Whether to use torch.compile; with 'triton' this is for arguments that the kernels do not take, on a GPU."""
        return self.compile_terms is True or (self.compile_terms == 'triton' and preds_S.device.type != 'cpu')


@MODELS.register_module()
class DKD(_Tempered):
    """Decoupled distillation, :func:`mmwsl.functional.dkd_loss` (arXiv 2203.08679).

    Args:
        tau: Temperature. The authors use 4 on CIFAR-100 and 1 on ImageNet.
        alpha: Weight of the true class against all others. The authors use 1.
        beta: Weight of the distribution among the others. The authors use 2, 6 or 8 on CIFAR-100, depending on the
            pair, and 0.5 (ResNet-34 to 18) or 2 (ResNet-50 to MobileNetV1) on ImageNet. They increase the loss over 20
            epochs on CIFAR-100 (``warmup_epochs`` of :class:`WeightedLoss`).

    Examples:
        >>> import torch
        >>> DKD(tau=1.0)(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
        tensor([0.1308])
    """

    needs_classes = True

    def __init__(self, tau: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__(tau)
        self.alpha, self.beta = alpha, beta

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss of each target. Shape: (N, \*)."""
        return functional.dkd_loss(preds_S, preds_T, target, self.tau, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, alpha={self.alpha}, beta={self.beta}'


@MODELS.register_module()
class NKD(_Tempered):
    """Normalised distillation, :func:`mmwsl.functional.nkd_loss` (arXiv 2303.13005).

    Args:
        tau: Temperature of all classes except the true one. The authors use 1 on ImageNet and 3 on CIFAR-100.
        gamma: Weight of these classes. The authors use 1.5 on ImageNet (1 for DeiT) and 3.5 on CIFAR-100.

    Examples:
        >>> import torch
        >>> NKD()(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))  # 0.75 ln 2
        tensor([0.5199])
    """

    needs_classes = True

    def __init__(self, tau: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__(tau)
        self.gamma = gamma

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss of each target. Shape: (N, \*)."""
        return functional.nkd_loss(preds_S, preds_T, target, self.tau, self.gamma)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, gamma={self.gamma}'


@MODELS.register_module()
class DIST(_Tempered):
    """DIST (arXiv 2205.10536): a loss on relations between the classes of each target and between the targets of each
    class. The first can be weighted; the second is a term of the batch as a whole, and cannot.

    Args:
        tau: Temperature. The authors use 1 on ImageNet and 4 on CIFAR-100.
        beta: Weight of the relations between classes, :func:`mmwsl.functional.dist_inter_loss`.
        gamma: Weight of the relations between targets, :func:`mmwsl.functional.dist_intra_loss`. The authors set beta
            and gamma to 1, with a loss_weight of 2.

    Examples:
        >>> from mmwsl.models import WeightedLoss
        >>> WeightedLoss(dict(type='DIST'), dict(type='WSLWeighting'), loss_weight=2.0).sample_loss
        DIST(tau=1.0, beta=1.0, gamma=1.0)
    """

    def __init__(self, tau: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__(tau)
        self.beta, self.gamma = beta, gamma

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss on relations between the classes of each target. Shape: (N, \*)."""
        return self.beta * functional.dist_inter_loss(preds_S, preds_T, self.tau)

    def of_the_whole(self, preds_S: Tensor, batch: SampleBatch) -> Tensor | None:
        """Return the loss on relations between targets. A scalar, or None if gamma is 0."""
        if self.gamma == 0:
            return None
        preds_S, preds_T = batch.without_ignored(preds_S), batch.without_ignored(batch.preds_T)
        return self.gamma * functional.dist_intra_loss(preds_S, preds_T, self.tau, batch.kept)

    @property
    def is_weightable(self) -> bool:
        return self.beta != 0

    @property
    def has_term_of_the_whole(self) -> bool:
        return self.gamma != 0

    def extra_repr(self) -> str:
        return f'tau={self.tau}, beta={self.beta}, gamma={self.gamma}'


@MODELS.register_module()
class TTM(_Tempered):
    """Transformed teacher matching, :func:`mmwsl.functional.ttm_loss` (arXiv 2402.11148). Weighted by
    :class:`mmwsl.models.weightings.WTTMWeighting` it is WTTM.

    Args:
        tau: Temperature of the teacher. The authors write gamma for 1 / tau, and set it to 0.1 with a loss_weight of 45
            in their example (VGG-13 to VGG-8 on CIFAR-100).

    Examples:
        >>> from mmwsl.models import WeightedLoss
        >>> wttm = WeightedLoss(dict(type='TTM', tau=4.0), dict(type='WTTMWeighting', tau=4.0))
    """

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__(tau)

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss of each target. Shape: (N, \*)."""
        return functional.ttm_loss(preds_S, preds_T, self.tau)


@MODELS.register_module()
class Standardized(SampleLoss):
    """Apply another loss to standardised logits (arXiv 2403.01427); the weighting still receives the original logits.

    Args:
        loss: Config of the other loss. Default: ``dict(type='SoftCrossEntropy', tau=2.0)``, which the authors use with
            a loss_weight of 9, and with the hard loss weighted by 1 on ImageNet and 0.1 on CIFAR-100.

    Raises:
        ValueError: If the loss is for sigmoid heads, whose classes have no common scale.

    Examples:
        >>> import torch
        >>> loss = Standardized(dict(type='SoftCrossEntropy', tau=1.0))
        >>> student, teacher, target = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 6.0]]), torch.tensor([1])
        >>> loss(student, teacher, target) - loss(teacher, teacher, target) < 1e-6  # neither scale nor shift counts
        tensor([True])
    """

    def __init__(self, loss: Any = None) -> None:
        super().__init__()
        self.loss = build_loss(loss or dict(type='SoftCrossEntropy', tau=2.0))
        if self.loss.for_sigmoids:
            raise ValueError(
                f'logits are standardised among the classes of a softmax, and {type(self.loss).__name__} '
                'is for sigmoid heads: use it without Standardized'
            )
        self.needs_classes, self.never_vanishes = self.loss.needs_classes, self.loss.never_vanishes

    @property
    def tau(self) -> float:  # type: ignore[override]
        """Temperature of the inner loss."""
        return self.loss.tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self.loss.tau = tau

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the inner loss on standardised logits. Shape: (N, \*)."""
        return self.loss(functional.standardized(preds_S), functional.standardized(preds_T), target)

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor | None:
        """Return the divergence of the inner loss, on standardised logits."""
        return self.loss.divergence(losses, functional.standardized(preds_T))

    def of_the_whole(self, preds_S: Tensor, batch: SampleBatch) -> Tensor | None:
        """Return the inner loss's term of the batch as a whole, on standardised logits."""
        if not self.has_term_of_the_whole:
            return None
        preds_S, preds_T = (functional.standardized(batch.without_ignored(preds)) for preds in (preds_S, batch.preds_T))
        inner = self.loss.batch_type(preds_S, preds_T, batch.target, self.tau)
        inner.kept = batch.kept
        return self.loss.of_the_whole(preds_S, inner)

    @property
    def is_weightable(self) -> bool:
        return self.loss.is_weightable

    @property
    def has_term_of_the_whole(self) -> bool:
        return self.loss.has_term_of_the_whole


@MODELS.register_module()
class BernoulliKD(_Tempered):
    r"""Soft labels for a sigmoid head, in which each class of a target is a separate decision:
    :func:`mmwsl.functional.bernoulli_loss`.

    Its ``gt_labels`` are one of

    - class scores in [0, 1]. Shape: (N, C, \*);
    - class indices, with C for background, where no class is right. Shape: (N, \*);
    - (class indices, quality), where the quality is the score that the right class should get, as in GFL and RTMDet.
      Shape: (N, \*) each.

    Args:
        tau: Temperature.
        per_class: Whether each class of a target has its own weight. False: all classes of a target share one weight,
            computed from hard losses that are summed over the classes.

    Examples:
        >>> import torch
        >>> BernoulliKD()(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
        tensor([[0.6931, 0.6931]])
        >>> BernoulliKD(per_class=False)(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
        tensor([1.3863])
    """

    never_vanishes = True

    def __init__(self, tau: float = 1.0, per_class: bool = True) -> None:
        super().__init__(tau)
        self.per_class = per_class
        self.batch_type = BernoulliBatch if per_class else JointBernoulliBatch

    @property
    def for_sigmoids(self) -> bool:
        return True

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Compute the loss of each class, (N, C, \*), or with ``per_class=False`` of each target, (N, \*)."""
        losses = functional.bernoulli_loss(preds_S, preds_T, self.tau)
        return losses if self.per_class else losses.sum(1)

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor:
        """Subtract the entropies of the teacher's decisions from the cross-entropies. Shape: as losses."""
        least = functional.bernoulli_loss(preds_T, preds_T, self.tau)
        return (losses - (least if self.per_class else least.sum(1))) / self.tau**2

    def check(self, preds_S: Tensor, preds_T: Tensor, target: Target, ignore_index: int) -> None:
        """Raise TypeError or ValueError if the arguments do not match; several labels may be right."""
        functional.check_logits(preds_S, preds_T)
        labels, quality = target if isinstance(target, tuple) else (target, None)
        functional.check_target(preds_S, labels, ignore_index, background=True, later=False)  # batch.target does
        functional.check_label_scores(labels)
        if quality is not None:
            if labels.is_floating_point() or quality.shape != labels.shape:
                raise ValueError(
                    'each class index should have one quality, got indices of shape '
                    f'{tuple(labels.shape)} ({labels.dtype}) and qualities of shape {tuple(quality.shape)}'
                )
            functional.check_label_scores(quality)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, per_class={self.per_class}'
