r"""Fast computation of the soft labels' loss and of the losses that weight it, with a gradient written by hand.

:mod:`mmwsl.functional` has the same equations in plain torch. Here the tempered softmaxes are used for both value and
gradient, :math:`\partial (\tau^2 H) / \partial z_s = \tau (p_s - p_t)`. The losses at temperature 1 are precise even if
they are small, as a confident teacher's are, because the true class is left out of the sum:

.. math::
    CE(z, y) = \log(1 + e^x), \quad
    x = \log \sum_{i \ne y} e^{z_i} - z_y = \log \sum_{i \ne y} p_i^\tau - \tau \log p_y

On a CPU the batch is processed in blocks that fit the cache, in memory that is allocated once, and at the paper's
temperatures the last form saves an exponential for each logit. On other devices torch.compile can fuse the code into
kernels, or, for targets with one class each, the kernels of ``mmwsl.models.losses.kernel`` can replace it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmwsl import functional

_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 2**18  # elements: a few blocks of float32 fit the cache of today's CPUs
_SMALLEST = 1e-30  # a probability whose logarithm and power of 4 are still exact enough in float32


class Terms(NamedTuple):
    r"""Terms of each target's loss. Only ``soft_loss`` has a gradient. Shape: (N, \*) each."""

    soft_loss: Tensor
    """Distillation loss, unweighted."""
    student_hard_loss: Tensor
    """Cross-entropy at temperature 1."""
    teacher_hard_loss: Tensor
    true_prob_difference: Tensor
    """Student's minus teacher's probability of the true class at temperature tau; its expectation for soft targets."""
    wsl_weight: Tensor | None = None
    """:func:`mmwsl.functional.weight_of_losses` of the two hard losses; only the kernels compute it."""


def soft_terms(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, compile: bool = False, ignored: Tensor | None = None
) -> Terms:
    r"""Compute :func:`mmwsl.functional.soft_cross_entropy`, :func:`mmwsl.functional.hard_loss` and probabilities for
    :func:`mmwsl.functional.bias_and_variance_gradients`, from arguments that have been checked.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices in [0, C), (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the soft labels.
        compile: Whether to use torch.compile.
        ignored: Mask of the targets that get no gradient, whatever their logits. None: all count. Shape: (N, \*).
    """
    return _terms(*_SoftTerms.apply(preds_S, preds_T.detach(), target, tau, compile, ignored))


def kernel_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, ignore_index: int) -> Terms:
    r"""Compute the terms of :func:`soft_terms` with Triton's kernels, for arguments that :func:`kernel_takes`.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices in [0, C) or ignore_index; others are reported by CUDA asynchronously. Shape: (N, \*).
        tau: Temperature of the soft labels.
        ignore_index: Class index whose targets do not count. Their terms and gradients are 0, whatever their logits.
    """
    return _terms(*_KernelTerms.apply(preds_S, preds_T.detach(), target, tau, ignore_index))


def _terms(soft_loss: Tensor, *others: Tensor) -> Terms:
    """Collect the terms, detached again: torch.compile of torch 2.11 ignores ``mark_non_differentiable`` for views."""
    return Terms(soft_loss, *(term.detach() for term in others))


def kernel_takes(preds_S: Tensor, preds_T: Tensor, target: Tensor) -> bool:
    """Whether there is a kernel for tensors of these types on this device."""
    known = all(preds.dtype in _KERNEL_TYPES for preds in (preds_S, preds_T))
    on_device = preds_S.device.type in functional.REPORTS_LATER or kernel_module().is_interpreted()
    return known and on_device and not target.is_floating_point()


def kernel_module() -> ModuleType:
    """Import the kernels, and with them Triton.

    Raises:
        ImportError: If Triton is missing.
    """
    from mmwsl.models.losses import kernel

    return kernel


class _SoftTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, compile: bool, ignored: Tensor | None
    ) -> tuple[Tensor, ...]:
        walks = preds_S.device.type == 'cpu' and not torch.compiler.is_compiling()
        make_terms = _compiled_terms() if compile else _walked_terms if walks else _careful_terms
        (*terms, _), difference = make_terms(preds_S, preds_T, target, tau)
        if ignored is not None:
            difference.masked_fill_(ignored.unsqueeze(1), 0)
        ctx.mark_non_differentiable(*terms[1:])
        ctx.set_materialize_grads(False)
        ctx.tau, ctx.dtype = tau, preds_S.dtype
        ctx.save_for_backward(difference)
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None, None]:
        _refuse_second_derivative()
        if grad_loss is None:
            return None, None, None, None, None, None
        (difference,) = ctx.saved_tensors
        return (difference * (grad_loss * ctx.tau).unsqueeze(1)).to(ctx.dtype), None, None, None, None, None


class _KernelTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, ignore_index: int
    ) -> tuple[Tensor, ...]:
        terms = torch.ops.mmwsl.soft_terms(preds_S, preds_T, target, tau, ignore_index).unbind()
        ctx.mark_non_differentiable(*terms[1:])
        ctx.set_materialize_grads(False)
        ctx.tau, ctx.ignore_index = tau, ignore_index
        ctx.save_for_backward(preds_S, preds_T, target)
        return terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
        _refuse_second_derivative()
        if grad_loss is None:
            return None, None, None, None, None
        gradient = torch.ops.mmwsl.soft_gradient(*ctx.saved_tensors, grad_loss, ctx.tau, ctx.ignore_index)
        return gradient, None, None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # once_differentiable would let a constant's zeros through
        raise RuntimeError(
            'WSLLoss has only a first derivative, and create_graph=True needs the second: '
            'use mmwsl.functional.wsl_loss, which has both'
        )


def _walked_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> tuple[Terms, Tensor]:
    """Terms and difference as from :func:`_careful_terms`, computed block by block."""
    difference = torch.empty_like(preds_S, dtype=torch.promote_types(preds_S.dtype, torch.float32))
    rows = max(1, _BLOCK * len(preds_S) // max(preds_S.numel(), 1))
    scratch: Tensor | None = None
    parts = []
    for part in zip(*(tensor.split(rows) for tensor in (preds_S, preds_T, target, difference)), strict=True):
        terms = []
        for block in _blocks(*part):
            if scratch is None and _is_quick(target, tau):
                scratch = torch.empty(2, block[0].numel(), dtype=difference.dtype)  # the first block is the largest
            terms.append(_block_terms(tau, scratch, *block))
        parts.append(_joined(terms, 1))
    return _joined(parts, 0), difference


def _blocks(preds_S: Tensor, preds_T: Tensor, target: Tensor, difference: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split an image that is too large for a block into strips of its height."""
    if len(preds_S) > 1 or preds_S.dim() < 3 or preds_S.numel() <= _BLOCK:
        return [(preds_S, preds_T, target, difference)]
    height = max(1, _BLOCK // (preds_S.numel() // preds_S.shape[2]))
    lines = target.dim() - preds_S.dim() + 2  # indices have no dimension of classes
    return zip(
        preds_S.split(height, 2),
        preds_T.split(height, 2),
        target.split(height, lines),
        difference.split(height, 2),
        strict=True,
    )


def _joined(terms: list[Terms], dim: int) -> Terms:
    if len(terms) == 1:
        return terms[0]
    return Terms(*(torch.cat(values, dim) for values in zip(*(of_block[:4] for of_block in terms), strict=True)))


def _is_quick(target: Tensor, tau: float) -> bool:
    return tau in (2, 4) and not target.is_floating_point() and target.numel() > 0


def _block_terms(
    tau: float, scratch: Tensor | None, preds_S: Tensor, preds_T: Tensor, target: Tensor, difference: Tensor
) -> Terms:
    """Terms of a block; p_s - p_t is written to ``difference``."""
    if scratch is not None:
        memory = scratch[:, : preds_S.numel()].view(2, *preds_S.shape)
        terms = _quick_terms(tau, memory, preds_S, preds_T, target.unsqueeze(1), difference)
        if terms is not None:
            return terms
    terms, values = _careful_terms(preds_S, preds_T, target, tau)
    difference.copy_(values)
    return terms


def _quick_terms(
    tau: float, memory: Tensor, preds_S: Tensor, preds_T: Tensor, index: Tensor, difference: Tensor
) -> Terms | None:
    """Terms at temperature 2 or 4, computed in the given memory; None if a true class's probability vanishes."""
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
    """Terms for any temperature, logits and targets, computed from logarithms; and p_s - p_t."""
    dtype = torch.promote_types(preds_S.dtype, torch.float32)
    preds_S, preds_T = preds_S.to(dtype), preds_T.to(dtype)
    log_probs_S, probs_T = F.log_softmax(preds_S / tau, 1), F.softmax(preds_T / tau, 1)
    soft = (log_probs_S * probs_T).sum(1) * -(tau**2)
    difference = log_probs_S.exp() - probs_T
    hard_S, hard_T = (functional.cross_entropy(preds, target) for preds in (preds_S, preds_T))
    return Terms(soft, hard_S, hard_T, functional.at_target(difference, target)), difference


@cache
def _compiled_terms() -> Callable[..., tuple[Terms, Tensor]]:
    return torch.compile(_careful_terms)
