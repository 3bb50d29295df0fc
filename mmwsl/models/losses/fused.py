r"""The soft labels' loss and the losses that weight it, in one pass over the logits, with the gradient by hand.

:mod:`functional` says what is computed; this says it fast. Three things save time. The tempered softmaxes serve the
value and the gradient, :math:`\partial (\tau^2 H) / \partial z_s = \tau (p_s - p_t)`. The losses at temperature 1
come out of the tempered probabilities p without exponentials of their own, and precisely so where they are small:

.. math::
    CE(z, y) = \log \sum_i (p_i / p_y)^\tau = \log(1 + e^x), \quad x = \log \sum_{i \ne y} p_i^\tau - \tau \log p_y

And on a CPU the batch is walked in blocks that stay in its cache, so that beside the inputs little more than the
gradient takes memory.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 2**18  # elements: a few blocks of float32 fit the cache of today's CPUs
_SMALLEST = 1e-30  # a probability whose logarithm and power of 4 are still exact enough in float32


class Terms(NamedTuple):
    r"""What the loss of each target is made of. Only ``soft_loss`` has a gradient. Shape: (N, \*) each."""
    soft_loss: Tensor
    """Unweighted."""
    student_hard_loss: Tensor
    """At temperature 1."""
    teacher_hard_loss: Tensor
    student_true_prob: Tensor
    """At temperature tau; for soft targets its expectation."""
    teacher_true_prob: Tensor


def soft_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> Terms:
    r"""As :func:`functional.soft_cross_entropy`, :func:`functional.hard_loss` and the probabilities that
    :func:`functional.bias_and_variance_gradients` takes, for arguments that have been checked.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices in [0, C), (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the soft labels.
    """
    return Terms(*_SoftTerms.apply(preds_S, preds_T.detach(), target, tau))


class _SoftTerms(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> tuple[Tensor, ...]:
        difference = torch.empty_like(preds_S, dtype=torch.promote_types(preds_S.dtype, torch.float32))
        blocks = [_block_terms(tau, *block) for block in _blocks(preds_S, preds_T, target, difference)]
        terms = blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))
        ctx.mark_non_differentiable(*terms[1:])
        ctx.set_materialize_grads(False)
        ctx.tau, ctx.dtype = tau, preds_S.dtype
        ctx.save_for_backward(difference)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None
        difference, = ctx.saved_tensors
        return (difference * (grad_loss * ctx.tau).unsqueeze(1)).to(ctx.dtype), None, None, None


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split a batch: into cache-sized parts on a CPU, not at all elsewhere."""
    logits = tensors[0]
    if logits.device.type != 'cpu' or logits.numel() <= _BLOCK:
        return [tensors]
    rows = max(1, _BLOCK * len(logits) // logits.numel())
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def _block_terms(tau: float, preds_S: Tensor, preds_T: Tensor, target: Tensor,
                 difference: Tensor) -> tuple[Tensor, ...]:
    """The terms of a block; ``difference`` is filled with p_s - p_t."""
    preds_S, preds_T = preds_S.to(difference.dtype), preds_T.to(difference.dtype)
    if tau in (2, 4) and preds_S.device.type == 'cpu' and not target.is_floating_point() and target.numel():
        terms = _quick_terms(tau, preds_S, preds_T, target.unsqueeze(1), difference)
        if terms is not None:
            return terms
    return _careful_terms(tau, preds_S, preds_T, target, difference)


def _quick_terms(tau: float, preds_S: Tensor, preds_T: Tensor, index: Tensor,
                 difference: Tensor) -> tuple[Tensor, ...] | None:
    """For the paper's temperatures: one exponential for each logit. None where a true class's probability vanishes."""
    logits_S = preds_S / tau
    probs_S, probs_T = torch.softmax(logits_S, 1), torch.softmax(preds_T / tau, 1)
    true_S, true_T = probs_S.gather(1, index).squeeze(1), probs_T.gather(1, index).squeeze(1)
    if min(true_S.min(), true_T.min()) < _SMALLEST:
        return None
    log_true_S = true_S.log()
    soft = logits_S.gather(1, index).squeeze(1).sub_(log_true_S).sub_(logits_S.mul_(probs_T).sum(1))  # H(p_t, p_s)
    torch.sub(probs_S, probs_T, out=difference)
    hard_S = _quick_hard_loss(probs_S, log_true_S, index, tau)
    hard_T = _quick_hard_loss(probs_T, true_T.log(), index, tau)
    return soft.mul_(tau**2), hard_S, hard_T, true_S, true_T


def _quick_hard_loss(probs: Tensor, log_true: Tensor, index: Tensor, tau: float) -> Tensor:
    """Cross-entropy at temperature 1 from probabilities at temperature 2 or 4, which are used up. Shape: (N, *)."""
    # without the true class: beside its 1, float32 would lose all of a confident teacher's loss
    others = probs.scatter_(1, index, torch.zeros_like(log_true).unsqueeze(1))
    for _ in range(int(tau) // 2):
        others.mul_(others)
    return F.softplus(others.sum(1).log_().sub_(log_true, alpha=tau), threshold=40)


def _careful_terms(tau: float, preds_S: Tensor, preds_T: Tensor, target: Tensor,
                   difference: Tensor) -> tuple[Tensor, ...]:
    """For every temperature, logit and target: by way of logarithms."""
    logits = torch.stack((preds_S, preds_T))
    hard_S, hard_T = -_at_target(torch.log_softmax(logits, 2), target)
    log_probs = torch.log_softmax(logits.div_(tau), 2)
    probs = log_probs.exp()
    soft = -(log_probs[0] * probs[1]).sum(1)
    true_S, true_T = _at_target(probs, target)
    torch.sub(probs[0], probs[1], out=difference)
    return soft.mul_(tau**2), hard_S, hard_T, true_S, true_T


def _at_target(values: Tensor, target: Tensor) -> Tensor:
    """The value of each target's class, or its expectation under class scores. Shape: (2, N, *)."""
    if target.is_floating_point():
        return (target.to(values.dtype) * values).sum(2)
    return values.gather(2, target.unsqueeze(1).expand(2, *target.unsqueeze(1).shape)).squeeze(2)
