"""Losses between the logits of student and teacher, with one value for each target."""

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
    """A loss with a temperature."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        functional.check_temperature(tau)
        self.tau = tau

    def extra_repr(self) -> str:
        return f'tau={self.tau}'


@MODELS.register_module()
class SoftCrossEntropy(_Tempered):
    r"""Knowledge distillation, :math:`\tau^2 H(\sigma(z_t / \tau), \sigma(z_s / \tau))` (arXiv 1503.02531).

    The cross-entropy, not the KL divergence: the gradient is the same, the value larger by the teacher's entropy.

    Args:
        tau: Temperature of the soft labels, above 0.
        compile: Whether torch.compile makes one kernel of the passes over the logits. It is meant for GPUs, where each
            pass reads all of them again; the first batch waits for the compiler. A CPU gains little. 'triton' takes
            kernels written by hand in its place, for class indices and logits of at most 32 bits: fewer calls, one
            tensor of the logits' size for the gradient and no other. It needs the extra ``triton`` and a GPU; on a CPU
            it changes nothing.

    Raises:
        ValueError: If compile is something else.
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
        r"""Shape: (N, \*)."""
        if self._uses_kernel(preds_S, preds_T, target):
            return kernel_terms(preds_S, preds_T, target, self.tau, functional.IGNORE_INDEX).soft_loss
        return soft_terms(preds_S, preds_T, target, self.tau, self._compiles(preds_S)).soft_loss

    def of_batch(self, preds_S: Tensor, batch: SampleBatch) -> Tensor:
        """As forward. The same passes over the logits give the weight's losses, too."""
        terms = self._terms(preds_S, batch)
        batch.student_hard_loss, batch.teacher_hard_loss = terms.student_hard_loss, terms.teacher_hard_loss
        batch.true_prob_difference = terms.true_prob_difference
        if terms.wsl_weight is not None:
            batch.wsl_weight = batch.masked_weight = terms.wsl_weight
        return terms.soft_loss

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor:
        r"""The cross-entropy without the teacher's entropy. Shape: (N, \*)."""
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
        """What the kernels do not take, torch.compile does, off the CPU."""
        return self.compile_terms is True or (self.compile_terms == 'triton' and preds_S.device.type != 'cpu')


@MODELS.register_module()
class DKD(_Tempered):
    """Decoupled distillation, :func:`mmwsl.functional.dkd_loss` (arXiv 2203.08679).

    Args:
        tau: Temperature. Its authors: 4 on CIFAR-100, 1 on ImageNet.
        alpha: Weight of the true class against all others. Its authors: 1.
        beta: Weight among the others. Its authors, by pair: 2, 6 or 8 on CIFAR-100; 0.5 (ResNet-34 to 18) or 2
            (ResNet-50 to MobileNetV1) on ImageNet. They let the loss grow over 20 epochs on CIFAR-100
            (``warmup_epochs`` of :class:`WeightedLoss`).

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
        r"""Shape: (N, \*)."""
        return functional.dkd_loss(preds_S, preds_T, target, self.tau, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, alpha={self.alpha}, beta={self.beta}'


@MODELS.register_module()
class NKD(_Tempered):
    """Normalised distillation, :func:`mmwsl.functional.nkd_loss` (arXiv 2303.13005).

    Args:
        tau: Temperature of the classes but the true one. Its authors: 1 on ImageNet, 3 on CIFAR-100.
        gamma: Weight of these classes. Its authors: 1.5 on ImageNet (1 for DeiT), 3.5 on CIFAR-100.

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
        r"""Shape: (N, \*)."""
        return functional.nkd_loss(preds_S, preds_T, target, self.tau, self.gamma)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, gamma={self.gamma}'


@MODELS.register_module()
class DIST(_Tempered):
    """DIST (arXiv 2205.10536): relations between the classes of a target, which can be weighted, and between the
    targets of a class, a term of the batch as a whole, which cannot.

    Args:
        tau: Temperature. Its authors: 1 on ImageNet, 4 on CIFAR-100.
        beta: Weight of the relations between classes, :func:`mmwsl.functional.dist_inter_loss`.
        gamma: Weight of the relations between targets, :func:`mmwsl.functional.dist_intra_loss`. Its authors: beta and
            gamma 1, with a loss_weight of 2.

    Examples:
        >>> from mmwsl.models import WeightedLoss
        >>> WeightedLoss(dict(type='DIST'), dict(type='WSLWeighting'), loss_weight=2.0).sample_loss
        DIST(tau=1.0, beta=1.0, gamma=1.0)
    """

    def __init__(self, tau: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__(tau)
        self.beta, self.gamma = beta, gamma

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Shape: (N, \*)."""
        return self.beta * functional.dist_inter_loss(preds_S, preds_T, self.tau)

    def of_the_whole(self, preds_S: Tensor, batch: SampleBatch) -> Tensor | None:
        """The relations between targets. A scalar."""
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
        tau: Temperature of the teacher. Its authors write gamma for 1 / tau, with 0.1 and a loss_weight of 45 in their
            example (VGG-13 to VGG-8 on CIFAR-100).

    Examples:
        >>> from mmwsl.models import WeightedLoss
        >>> wttm = WeightedLoss(dict(type='TTM', tau=4.0), dict(type='WTTMWeighting', tau=4.0))
    """

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__(tau)

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Shape: (N, \*)."""
        return functional.ttm_loss(preds_S, preds_T, self.tau)


@MODELS.register_module()
class Standardized(SampleLoss):
    """Another loss on standardised logits (arXiv 2403.01427); a weighting still sees them as they are.

    Args:
        loss: Config of the loss. Default: ``dict(type='SoftCrossEntropy', tau=2.0)``. Its authors: this with a
            loss_weight of 9, and the hard loss with 1 on ImageNet and 0.1 on CIFAR-100.

    Raises:
        ValueError: If the loss is for sigmoids, since they have no logits to be standardised among.

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
                'is for heads of sigmoids: leave Standardized out'
            )
        self.needs_classes, self.never_vanishes = self.loss.needs_classes, self.loss.never_vanishes

    @property
    def tau(self) -> float:  # type: ignore[override]
        """The inner loss's."""
        return self.loss.tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self.loss.tau = tau

    def forward(self, preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        r"""Shape: (N, \*)."""
        return self.loss(functional.standardized(preds_S), functional.standardized(preds_T), target)

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor | None:
        """The inner loss's, of standardised logits."""
        return self.loss.divergence(losses, functional.standardized(preds_T))

    def of_the_whole(self, preds_S: Tensor, batch: SampleBatch) -> Tensor | None:
        """The inner loss's."""
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
    r"""Soft labels for a head of sigmoids, in which each class of a target is a decision of its own:
    :func:`mmwsl.functional.bernoulli_loss`.

    Its ``gt_labels`` are one of

    - scores of the classes in [0, 1]. Shape: (N, C, \*);
    - class indices, of which C is background: no class is right. Shape: (N, \*);
    - (class indices, quality): the score that the right class should get, as of GFL and RTMDet. Shape: (N, \*) each.

    Args:
        tau: Temperature.
        per_class: Whether each class of a target has a weight of its own. False: one weight for all of a target, from
            hard losses that are summed over its classes.

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
        r"""Shape: (N, C, \*) per class, else (N, \*)."""
        losses = functional.bernoulli_loss(preds_S, preds_T, self.tau)
        return losses if self.per_class else losses.sum(1)

    def divergence(self, losses: Tensor, preds_T: Tensor) -> Tensor:
        """The cross-entropies without the entropies of the teacher's decisions. Shape: as losses."""
        least = functional.bernoulli_loss(preds_T, preds_T, self.tau)
        return (losses - (least if self.per_class else least.sum(1))) / self.tau**2

    def check(self, preds_S: Tensor, preds_T: Tensor, target: Target, ignore_index: int) -> None:
        """Raise TypeError or ValueError for arguments that do not belong together; several labels may be right."""
        functional.check_logits(preds_S, preds_T)
        labels, quality = target if isinstance(target, tuple) else (target, None)
        functional.check_target(preds_S, labels, ignore_index, background=True, later=False)  # batch.target does
        functional.check_label_scores(labels)
        if quality is not None:
            if labels.is_floating_point() or quality.shape != labels.shape:
                raise ValueError(
                    'a quality belongs to each class index, got indices of shape '
                    f'{tuple(labels.shape)} ({labels.dtype}) and qualities of {tuple(quality.shape)}'
                )
            functional.check_label_scores(quality)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, per_class={self.per_class}'
