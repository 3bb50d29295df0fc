"""The loss of mmwsl 0.1.0 as it was released, for tests to compare WSLLoss with. Never edited; ruff skips it.

Its three files one after the other: functional.py, fused.py and wsl_loss.py of mmwsl/models/losses/, without their
docstrings, their imports of one another and the registry. Needs torch alone.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

functional = sys.modules[__name__]  # the next two files say functional.wsl_loss

# ---- functional.py

IGNORE_INDEX = -100
_REPORTS_LATER = ('cuda', 'meta')  # devices with torch._assert_async
_LARGEST_SUM = 1.02  # half precision rounds each class score
EPSILON = 1e-7  # the authors': keeps the ratio finite where the teacher's loss is 0


def wsl_loss(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 2.0,
             ignore_index: int = IGNORE_INDEX) -> Tensor:
    r"""Distillation loss of each target, weighted: :math:`w \cdot \tau^2 H`.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits, never differentiated. Shape: (N, C, \*).
        target: Class indices, (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the soft labels, above 0.
        ignore_index: An index whose targets lose 0.

    Returns:
        The loss of each target, 0 where it is ignored. Shape: (N, \*).

    Raises:
        TypeError: If logits are not floating point, or a target is neither int64 nor floating point.
        ValueError: If shapes do not belong together, tau is not positive, or an index is not in [0, C).
    """
    weight = wsl_weight(preds_S, preds_T, target, ignore_index)
    return weight * soft_cross_entropy(preds_S, preds_T, tau)


def wsl_weight(preds_S: Tensor, preds_T: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    r"""Weight of each target, :math:`1 - \exp(-L_s / L_t)` (Sec. 4 of the paper).

    It is large where the student has more to learn than the teacher has left to give: there bias reduction matters, and
    the soft label is trusted. ``weight * other_loss`` weights any other loss of one value per target.

    Args, Raises: As :func:`wsl_loss`.

    Returns:
        Weights in [0, 1], without gradient; 0 where the target is ignored or both losses are 0. Shape: (N, \*).
    """
    check_logits(preds_S, preds_T)
    with torch.no_grad():
        student = hard_loss(preds_S, target, ignore_index)
        teacher = hard_loss(preds_T, target, ignore_index)
        return weight_of_losses(student, teacher)


def weight_of_losses(student: Tensor, teacher: Tensor) -> Tensor:
    r""":math:`1 - \exp(-L_s / L_t)` of hard losses at temperature 1, of any shape."""
    return torch.expm1(student / -(teacher + EPSILON)).neg_()


def soft_cross_entropy(preds_S: Tensor, preds_T: Tensor, tau: float = 2.0) -> Tensor:
    r"""Unweighted distillation loss of each target, :math:`\tau^2 H(\sigma(z_t / \tau), \sigma(z_s / \tau))`.

    The cross-entropy, not the KL divergence: the gradient is the same, the value larger by the teacher's entropy.

    Args, Raises: As :func:`wsl_loss`.

    Returns:
        Loss of each target. Shape: (N, \*).
    """
    check_logits(preds_S, preds_T)
    check_temperature(tau)
    soft_labels = F.softmax(_at_least_float32(preds_T.detach()) / tau, dim=1)
    return -tau**2 * (soft_labels * F.log_softmax(_at_least_float32(preds_S) / tau, dim=1)).sum(1)


def hard_loss(preds: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    r"""Cross-entropy of each target at temperature 1: :math:`L_s` of the student, :math:`L_t` of the teacher.

    Args:
        preds: Logits. Shape: (N, C, \*).
        target: Class indices, (N, \*), or class scores, (N, C, \*).
        ignore_index: An index whose targets lose 0.

    Returns:
        Loss of each target. Shape: (N, \*).
    """
    check_target(preds, target, ignore_index)
    preds = _at_least_float32(preds)
    if target.is_floating_point():
        return cross_entropy(preds, target)
    kept = target != ignore_index
    return cross_entropy(preds, target * kept) * kept


def cross_entropy(preds: Tensor, target: Tensor) -> Tensor:
    """As torch's without reduction, for arguments that have been checked, and precise where it is nearly 0: log-softmax
    loses a sum that is nearly 1, so the true class is left out of it. Shape: (N, *)."""
    if target.is_floating_point():
        return -at_target(F.log_softmax(preds, dim=1), target)
    others = preds.scatter(1, target.unsqueeze(1), -torch.inf)
    return F.softplus(others.logsumexp(1) - at_target(preds, target), threshold=40)


def at_target(values: Tensor, target: Tensor) -> Tensor:
    """The value of each target's class, or its expectation under class scores. Shape: (N, *)."""
    if target.is_floating_point():
        return (target.to(values.dtype) * values).sum(1)
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def bias_and_variance_gradients(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 2.0,
                                ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    r"""Gradients a and b at the true class's logit (Sec. 3 of the paper).

    :math:`a = \partial L_{ce} / \partial z_y = p_{s,1} - 1` reduces bias, and
    :math:`b = \partial (L_{kd} - L_{ce}) / \partial z_y = \tau (p_{s,\tau} - p_{t,\tau}) - (p_{s,1} - 1)` reduces
    variance. A target with |b| > |a| is a *regularization sample*.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices. Shape: (N, \*).
        tau: Temperature of the soft labels, above 0.
        ignore_index: An index whose targets have a and b of class 0.

    Raises: As :func:`wsl_loss`; TypeError also for class scores, which have no one class.

    Returns:
        a and b, without gradient. Shape: (N, \*) each.
    """
    check_logits(preds_S, preds_T)
    check_temperature(tau)
    if target.is_floating_point():
        raise TypeError(f'target should hold one class each, as int64, got {target.dtype}')
    check_target(preds_S, target, ignore_index)
    target = target * (target != ignore_index)

    def log_prob(preds: Tensor, temperature: float) -> Tensor:
        return -cross_entropy(_at_least_float32(preds.detach()) / temperature, target)

    a = log_prob(preds_S, 1).expm1()
    b = tau * (log_prob(preds_S, tau).exp() - log_prob(preds_T, tau).exp()) - a
    return a, b


def kept_targets(target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mask of the targets that count. Shape: (N, *)."""
    if target.is_floating_point():
        return torch.ones_like(target[:, 0], dtype=torch.bool)
    return target != ignore_index


def check_logits(preds_S: Tensor, preds_T: Tensor) -> None:
    """Raise TypeError or ValueError unless the two are logits over the same classes of the same samples."""
    for name, preds in (('preds_S', preds_S), ('preds_T', preds_T)):
        if not preds.is_floating_point():
            raise TypeError(f'{name} should be floating-point logits, got {preds.dtype}')
        if preds.dim() < 2:
            raise ValueError(f'{name} should have shape (N, C) or (N, C, *), got {tuple(preds.shape)}')
    if preds_S.shape[1] != preds_T.shape[1]:
        raise ValueError(f'student and teacher should predict the same classes, got {preds_S.shape[1]} from the '
                         f'student and {preds_T.shape[1]} from the teacher')
    if preds_S.shape != preds_T.shape:
        raise ValueError(f'preds_S and preds_T should have the same shape, got {tuple(preds_S.shape)} and '
                         f'{tuple(preds_T.shape)}')


def check_target(preds: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise TypeError or ValueError unless target holds indices, or scores, of the logits' classes.

    CUDA itself reports an index out of range, later, so that nothing waits for it here.
    """
    if target.is_floating_point():
        if target.shape != preds.shape:
            raise ValueError(f'class scores should have the shape of the logits, {tuple(preds.shape)}, got '
                             f'{tuple(target.shape)}')
        return
    if target.dtype != torch.int64:
        raise TypeError(f'target should hold class indices (int64) or class scores (floating point), got '
                        f'{target.dtype}')
    expected = (preds.shape[0], *preds.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(f'class indices should have shape {expected} for logits of shape {tuple(preds.shape)}, got '
                         f'{tuple(target.shape)}')
    reports_later = target.device.type in _REPORTS_LATER
    if not reports_later and (target.numel() == 0 or _all_below(target, preds.shape[1])):
        return
    valid = ((target >= 0) & (target < preds.shape[1])) | (target == ignore_index)
    if reports_later:
        torch._assert_async(valid.all(), f'a class index is not in [0, {preds.shape[1]}) and not {ignore_index}')
    elif not valid.all():
        raise ValueError(f'class indices should lie in [0, {preds.shape[1]}) or be ignore_index={ignore_index}, got '
                         f'{target[~valid][0].item()}')


def _all_below(target: Tensor, num_classes: int) -> bool:
    """Whether all indices are classes, without a look at which."""
    lowest, highest = target.aminmax()
    return bool(lowest >= 0) and bool(highest < num_classes)


def check_single_label(target: Tensor) -> None:
    """Raise ValueError for class scores that sum up to more than 1: several labels at once, which no softmax predicts.

    CUDA itself reports them, later.
    """
    if not target.is_floating_point() or target.numel() == 0:
        return
    largest = target.detach().sum(1).max()
    message = 'class scores should sum up to 1 for each target, as those of mixup, cutmix or label smoothing'
    if target.device.type in _REPORTS_LATER:
        torch._assert_async(largest <= _LARGEST_SUM, message)
    elif not largest <= _LARGEST_SUM:  # nor may it be NaN
        raise ValueError(f'{message}, got {largest.item():.4g}. Weighted soft labels are for one label per target, not '
                         'for a multi-label head')


def check_temperature(tau: float) -> None:
    """Raise ValueError unless tau is a positive, finite number."""
    if not 0 < tau < float('inf'):
        raise ValueError(f'tau should be a positive number, got {tau}')


def _at_least_float32(preds: Tensor) -> Tensor:
    return preds.float() if preds.dtype in (torch.float16, torch.bfloat16) else preds


# ---- fused.py

_BLOCK = 2**18  # elements: a few blocks of float32 fit the cache of today's CPUs
_SMALLEST = 1e-30  # a probability whose logarithm and power of 4 are still exact enough in float32


class Terms(NamedTuple):
    r"""What the loss of each target is made of. Only ``soft_loss`` has a gradient. Shape: (N, \*) each."""
    soft_loss: Tensor
    """Unweighted."""
    student_hard_loss: Tensor
    """At temperature 1."""
    teacher_hard_loss: Tensor
    true_prob_difference: Tensor
    """The true class's probability at temperature tau, student's - teacher's; its expectation for soft targets."""


def soft_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, compile: bool = False) -> Terms:
    r"""As :func:`functional.soft_cross_entropy`, :func:`functional.hard_loss` and the probabilities that
    :func:`functional.bias_and_variance_gradients` takes, for arguments that have been checked.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices in [0, C), (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the soft labels.
        compile: Whether torch.compile makes kernels of it.
    """
    return Terms(*_SoftTerms.apply(preds_S, preds_T.detach(), target, tau, compile))


class _SoftTerms(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float,
                compile: bool) -> tuple[Tensor, ...]:
        on_cpu = preds_S.device.type == 'cpu'
        make_terms = _compiled_terms() if compile else _walked_terms if on_cpu else _careful_terms
        terms, difference = make_terms(preds_S, preds_T, target, tau)
        ctx.mark_non_differentiable(*terms[1:])
        ctx.set_materialize_grads(False)
        ctx.tau, ctx.dtype = tau, preds_S.dtype
        ctx.save_for_backward(difference)
        return terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would let a constant's zeros through
            raise RuntimeError('WSLLoss has a first derivative alone, and create_graph=True asks for a second one: '
                               'mmwsl.models.losses.functional.wsl_loss has both')
        if grad_loss is None:
            return None, None, None, None, None
        difference, = ctx.saved_tensors
        return (difference * (grad_loss * ctx.tau).unsqueeze(1)).to(ctx.dtype), None, None, None, None


def _walked_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> tuple[Terms, Tensor]:
    """As :func:`_careful_terms`, block by block."""
    difference = torch.empty_like(preds_S, dtype=torch.promote_types(preds_S.dtype, torch.float32))
    rows = max(1, _BLOCK * len(preds_S) // max(preds_S.numel(), 1))
    scratch = difference.new_empty(2, *difference[:rows].shape) if _is_quick(target, tau) else None
    blocks = zip(*(tensor.split(rows) for tensor in (preds_S, preds_T, target, difference)), strict=True)
    terms = [_block_terms(tau, scratch, *block) for block in blocks]
    return (terms[0] if len(terms) == 1 else Terms(*map(torch.cat, zip(*terms, strict=True)))), difference


def _is_quick(target: Tensor, tau: float) -> bool:
    return tau in (2, 4) and not target.is_floating_point() and target.numel() > 0


def _block_terms(tau: float, scratch: Tensor | None, preds_S: Tensor, preds_T: Tensor, target: Tensor,
                 difference: Tensor) -> Terms:
    """The terms of a block; ``difference`` is filled with p_s - p_t."""
    if scratch is not None:
        terms = _quick_terms(tau, scratch[:, :len(target)], preds_S, preds_T, target.unsqueeze(1), difference)
        if terms is not None:
            return terms
    terms, values = _careful_terms(preds_S, preds_T, target, tau)
    difference.copy_(values)
    return terms


def _quick_terms(tau: float, memory: Tensor, preds_S: Tensor, preds_T: Tensor, index: Tensor,
                 difference: Tensor) -> Terms | None:
    """At temperature 2 or 4, in the memory that is given. None where a true class's probability vanishes."""
    probs_S, (probs_T, scratch) = difference, memory
    torch.softmax(scratch.copy_(preds_T).div_(tau), 1, out=probs_T)
    logits_S = scratch.copy_(preds_S).div_(tau)
    torch.softmax(logits_S, 1, out=probs_S)
    true_S, true_T = probs_S.gather(1, index), probs_T.gather(1, index)
    if min(true_S.min(), true_T.min()) < _SMALLEST:
        return None
    log_true_S = true_S.log()
    soft = logits_S.gather(1, index).sub_(log_true_S).squeeze(1).sub_(logits_S.mul_(probs_T).sum(1))  # H(p_t, p_s)
    hard_S = _quick_hard_loss(probs_S, log_true_S, index, tau, scratch)
    hard_T = _quick_hard_loss(probs_T, true_T.log(), index, tau, scratch)
    difference.sub_(probs_T)
    return Terms(soft.mul_(tau**2), hard_S, hard_T, true_S.sub_(true_T).squeeze(1))


def _quick_hard_loss(probs: Tensor, log_true: Tensor, index: Tensor, tau: float, scratch: Tensor) -> Tensor:
    """Cross-entropy at temperature 1 from probabilities at temperature 2 or 4. Shape: (N, *)."""
    others = torch.mul(probs, probs, out=scratch)
    if tau == 4:
        others.mul_(others)
    others.scatter_(1, index, 0)
    return F.softplus(others.sum(1).log_().sub_(log_true.squeeze(1), alpha=tau), threshold=40)


def _careful_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> tuple[Terms, Tensor]:
    """For every temperature, logit and target, by way of logarithms; beside the terms p_s - p_t."""
    dtype = torch.promote_types(preds_S.dtype, torch.float32)
    preds_S, preds_T = preds_S.to(dtype), preds_T.to(dtype)
    log_probs_S, probs_T = F.log_softmax(preds_S / tau, 1), F.softmax(preds_T / tau, 1)
    soft = (log_probs_S * probs_T).sum(1) * -tau**2
    difference = log_probs_S.exp() - probs_T
    hard_S, hard_T = (functional.cross_entropy(preds, target) for preds in (preds_S, preds_T))
    return Terms(soft, hard_S, hard_T, functional.at_target(difference, target)), difference


@cache
def _compiled_terms() -> Callable[..., tuple[Terms, Tensor]]:
    return torch.compile(_careful_terms)


# ---- wsl_loss.py

_REDUCTIONS = ('none', 'mean', 'sum')
_WEIGHTINGS = ('wsl', 'one', 'drop_regularization', 'only_regularization', 'random')


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
