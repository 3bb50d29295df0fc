from __future__ import annotations

import torch
from torch import Tensor, nn

from mmwsl import functional
from mmwsl.models.losses.fused import Terms, soft_terms
from mmwsl.registry import MODELS

_REDUCTIONS = ('none', 'mean', 'sum')
_WEIGHTINGS = ('wsl', 'one', 'drop_regularization', 'only_regularization', 'random')


@MODELS.register_module()
class WSLLoss(nn.Module):
    r"""Weighted soft labels (arXiv 2102.00650): :math:`\alpha \cdot w_i \tau^2 H(\sigma(z_t/\tau), \sigma(z_s/\tau))`.

    It knows no number of classes, no device and no network, so any distiller of MMRazor can carry it. The hard loss is
    the student's own and keeps weight 1.

    Args:
        tau: Temperature of the soft labels. The paper: 4 on CIFAR-100, 2 on ImageNet.
        loss_weight: The paper's alpha: 2.25 on CIFAR-100, 2.5 on ImageNet.
        ignore_index: Class index whose targets do not count.
        reduction: 'mean' over the targets that are kept (0 where none is), 'sum' or 'none'.
        weighting: 'wsl', or a control that shows what the weight does: 'one' is plain knowledge distillation (KD);
            'drop_regularization' is 0 for regularization samples and 1 for the others, 'only_regularization' the
            reverse; 'random' hands the weights of a batch to its targets in an order drawn from torch's generator.
        compile: Whether torch.compile makes one kernel of the passes over the logits. It is meant for GPUs, where each
            pass reads all of them again; the first batch waits for the compiler. A CPU gains little.

    Examples:
        >>> loss = WSLLoss(tau=4.0, loss_weight=2.25)
        >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
        >>> loss(student, teacher, torch.randint(100, (8, ))).backward()
    """

    def __init__(self, tau: float = 2.0, loss_weight: float = 2.5, ignore_index: int = functional.IGNORE_INDEX,
                 reduction: str = 'mean', weighting: str = 'wsl', compile: bool = False) -> None:
        super().__init__()
        functional.check_temperature(tau)
        self.tau = tau
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.reduction = _checked_reduction(reduction)
        self.weighting = _checked_weighting(weighting)
        self.compile_terms = compile  # nn.Module.compile is a method
        self._terms: Terms | None = None
        self._wsl_weight = self._weight = self._kept = torch.empty(0)
        self._has_classes = True

    def forward(self, preds_S: Tensor, preds_T: Tensor, gt_labels: Tensor, weight: Tensor | None = None,
                avg_factor: float | None = None, reduction_override: str | None = None,
                teacher_hard_loss: Tensor | None = None) -> Tensor:
        r"""Loss of a batch.

        Args:
            preds_S: Student logits. Shape: (N, C) or (N, C, \*).
            preds_T: Teacher logits. Shape: as preds_S.
            gt_labels: Class indices, (N, \*), or class scores of the logits' shape.
            weight: A further weight for each target. Shape: (N, \*).
            avg_factor: What the sum is divided by instead of the number of targets kept.
            reduction_override: Replaces ``reduction`` for this call.
            teacher_hard_loss: The teacher's loss of each target at temperature 1, where it is known better than from
                preds_T, as of a teacher cache. Shape: (N, \*).

        Returns:
            A scalar, or with reduction 'none' one value for each target, (N, \*).

        Raises:
            TypeError: If logits are not floating point, or gt_labels are neither int64 nor floating point.
            ValueError: If shapes do not belong together, an index is not in [0, C), class scores sum up to more than 1
                or come with a weighting that needs to know regularization samples, or avg_factor comes with 'sum'.
        """
        functional.check_logits(preds_S, preds_T)
        functional.check_target(preds_S, gt_labels, self.ignore_index)
        functional.check_single_label(gt_labels)
        kept = functional.kept_targets(gt_labels, self.ignore_index)
        # an ignored target is computed as class 0, and then counts nothing
        target = gt_labels if gt_labels.is_floating_point() else gt_labels * kept
        terms = soft_terms(preds_S, preds_T, target, self.tau, self.compile_terms)
        if teacher_hard_loss is not None:
            given = _one_per_target(teacher_hard_loss.detach(), terms.soft_loss, 'teacher_hard_loss')
            terms = terms._replace(teacher_hard_loss=given)
        self._wsl_weight = functional.weight_of_losses(terms.student_hard_loss, terms.teacher_hard_loss)
        self._terms = terms._replace(soft_loss=terms.soft_loss.detach())  # what is kept must not keep the graph
        self._kept, self._has_classes = kept, not gt_labels.is_floating_point()
        self._weight = self._applied_weight()
        loss = terms.soft_loss * (self._weight * kept * self.loss_weight)
        if weight is not None:
            loss = loss * _one_per_target(weight, loss, 'weight')
        return _reduce(loss, kept, _checked_reduction(reduction_override or self.reduction), avg_factor)

    def _applied_weight(self) -> Tensor:
        if self.weighting == 'wsl':
            return self._wsl_weight
        if self.weighting == 'one':
            return torch.ones_like(self._wsl_weight)
        if self.weighting == 'random':
            return _permuted(self._wsl_weight, self._kept)
        if not self._has_classes:
            raise ValueError(f'weighting={self.weighting!r} needs class indices, got class scores: a regularization '
                             "sample has one true class. Use weighting='wsl', 'one' or 'random' with mixed labels")
        return (self._regularization() == (self.weighting == 'only_regularization')).to(self._wsl_weight.dtype)

    def _regularization(self) -> Tensor:
        a, b = self._gradients()
        return b.abs() > a.abs()

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """a and b of :func:`functional.bias_and_variance_gradients`; NaN for class scores, which have no one class."""
        terms: Terms = self._terms  # type: ignore[assignment]
        a = torch.expm1(-terms.student_hard_loss)
        b = self.tau * terms.true_prob_difference - a
        return (a, b) if self._has_classes else (torch.full_like(a, torch.nan), torch.full_like(b, torch.nan))

    @property
    def sample_terms(self) -> dict[str, Tensor]:
        r"""Of each target of the last forward, without gradient; empty before the first.

        ``w``: its weight by WSL, whichever is applied; ``L_s``, ``L_t``: hard losses of student and teacher, in nats;
        ``a``, ``b``: :func:`functional.bias_and_variance_gradients`, NaN for class scores; ``kept``: whether it counts.
        Shape: (N, \*) each.
        """
        if self._terms is None:
            return {}
        a, b = self._gradients()
        return dict(w=self._wsl_weight, L_s=self._terms.student_hard_loss, L_t=self._terms.teacher_hard_loss, a=a, b=b,
                    kept=self._kept)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Of the last forward, without gradient; empty before the first.

        ``wsl_weight``: the mean weight that was applied to the targets kept. ``regularization_share``, for class
        indices: the share of them with |b| > |a| (:func:`functional.bias_and_variance_gradients`).
        """
        if self._terms is None:
            return {}
        count = self._kept.sum().clamp(min=1)
        statistics = {'wsl_weight': (self._weight * self._kept).sum() / count}
        if self._has_classes:
            statistics['regularization_share'] = (self._regularization() & self._kept).sum() / count
        return statistics

    def extra_repr(self) -> str:
        return (f'tau={self.tau}, loss_weight={self.loss_weight}, ignore_index={self.ignore_index}, '
                f'reduction={self.reduction!r}, weighting={self.weighting!r}, compile={self.compile_terms}')


def _checked_reduction(reduction: str) -> str:
    if reduction not in _REDUCTIONS:
        raise ValueError(f'reduction should be one of {_REDUCTIONS}, got {reduction!r}')
    return reduction


def _one_per_target(values: Tensor, loss: Tensor, name: str) -> Tensor:
    if values.shape != loss.shape:
        raise ValueError(f'{name} should have one value per target, {tuple(loss.shape)}, got {tuple(values.shape)}')
    return values.to(loss.dtype)


def _checked_weighting(weighting: str) -> str:
    if weighting not in _WEIGHTINGS:
        raise ValueError(f'weighting should be one of {_WEIGHTINGS}, got {weighting!r}')
    return weighting


def _permuted(weight: Tensor, kept: Tensor) -> Tensor:
    """The same weights, and so the same mean, over the targets kept."""
    values, permuted = weight[kept], weight.clone()
    permuted[kept] = values[torch.randperm(len(values), device=weight.device)]
    return permuted


def _reduce(loss: Tensor, kept: Tensor, reduction: str, avg_factor: float | None) -> Tensor:
    if reduction == 'none':
        return loss
    if reduction == 'sum':
        if avg_factor is not None:
            raise ValueError(f"avg_factor belongs to reduction 'mean', got avg_factor={avg_factor} with 'sum'")
        return loss.sum()
    if avg_factor is None:
        return loss.sum() / kept.sum().clamp(min=1)
    return loss.sum() / torch.as_tensor(avg_factor).clamp(min=torch.finfo(loss.dtype).eps)  # 0 where nothing counts
