r"""Triton kernels for the soft labels' loss of targets with one class each: one for its terms, one for its gradient.

Both read the logits of student and teacher by their strides and in their own type, and compute in float32. A program
has a block of targets with all of their classes; if there are too many classes, it loops over chunks of them and merges
their sums, like an online softmax. The results are those of :func:`mmwsl.models.losses.fused.soft_terms`.

Importing this module needs the extra ``triton``. If TRITON_INTERPRET=1 was set before, the kernels run on CPU tensors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.compat import from_extra

with from_extra('triton'):
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

_EPSILON = tl.constexpr(functional.EPSILON)
_SMALLEST = tl.constexpr(2.0**-126)  # normal number; a smaller one would make Triton compute in float64
_LARGEST_ROW = 16384  # most classes that a program reads at once, if classes are adjacent in memory
_CHUNK = 2048  # classes read at once if there are more
_LARGEST_COLUMN = 256  # most classes that a program reads at once, if targets are adjacent in memory
_SMALLEST_TILE = 1024  # fewest logits of a program


class _Blocks(NamedTuple):
    """How the logits are divided among programs."""

    ROWS: int
    """Number of targets of a program, a power of two."""
    BLOCK: int
    """Number of classes that it reads at a time, a power of two."""
    LOOPED: bool
    """Whether there are more classes than that."""
    ALIGNED: int
    """Number of logits that can be read together: a divisor of the number of classes and of the strides of rows."""
    num_warps: int


def _blocks(logits: list[Tensor]) -> _Blocks:
    r"""Choose the blocks for tensors over the same classes of the same targets. Shape: (groups, C, targets) each."""
    _, classes, targets = logits[0].shape
    block, aligned = triton.next_power_of_2(classes), 1
    if all(tensor.stride(1) == 1 for tensor in logits):
        block = block if block <= _LARGEST_ROW else _CHUNK
        rows = max(1, _SMALLEST_TILE // block)
        aligned = math.gcd(16, classes, *(tensor.stride(dim) for tensor in logits for dim in (0, 2)))
    else:  # targets are adjacent in memory
        block = block if block <= _LARGEST_COLUMN else _LARGEST_COLUMN // 8
        rows = max(32, _SMALLEST_TILE // block)
    rows = min(rows, triton.next_power_of_2(targets))
    return _Blocks(rows, block, block < classes, aligned, min(16, max(1, rows * block // 256)))


def soft_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, ignore_index: int) -> Tensor:
    r"""Compute the terms of each target's loss.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: as preds_S.
        target: Class indices, int64. Shape: (N, \*).
        tau: Temperature of the soft labels, above 0.
        ignore_index: Class index whose targets do not count; all their terms are 0.

    Returns:
        Soft loss, hard losses of student and teacher, difference of the true class's probabilities at tau, and WSL's
        weight, all in float32. Shape: (5, N, \*).
    """
    terms = _empty_terms(preds_S, preds_T, target, tau, ignore_index)
    _run(terms_kernel, preds_S, preds_T, target, (terms.flatten(1),), tau, ignore_index)
    return terms


def soft_gradient(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, upstream: Tensor, tau: float, ignore_index: int
) -> Tensor:
    r"""Compute the gradient of the soft loss with respect to preds_S.

    Args:
        preds_S, preds_T, target, tau: As for :func:`soft_terms`.
        upstream: Gradient with respect to the soft loss of each target. Shape: (N, \*).
        ignore_index: Class index whose targets have a gradient of 0, whatever the upstream gradient.

    Returns:
        Gradient in the type of preds_S. Shape: as preds_S.
    """
    gradient = _empty_gradient(preds_S, preds_T, target, upstream, tau, ignore_index)
    _run(gradient_kernel, preds_S, preds_T, target, (_rows(gradient), _flat(upstream)), tau, ignore_index)
    return gradient


def _empty_terms(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float, ignore_index: int) -> Tensor:
    return target.new_empty((5, *target.shape), dtype=torch.float32)


def _empty_gradient(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, upstream: Tensor, tau: float, ignore_index: int
) -> Tensor:
    """An empty gradient in the layout of preds_S."""
    rows = torch.empty_like(_rows(preds_S))
    return rows[0].t() if preds_S.dim() == 2 else rows.view(preds_S.shape)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return isinstance(terms_kernel, InterpretedFunction)


def _run(
    kernel: Any,
    preds_S: Tensor,
    preds_T: Tensor,
    target: Tensor,
    others: tuple[Tensor, ...],
    tau: float,
    ignore_index: int,
) -> None:
    if not target.numel():
        return
    grid, arguments, settings = launch(preds_S, preds_T, target, others, tau, ignore_index)
    with torch.cuda.device_of(preds_S):  # Triton launches on the current device, not on that of the tensors
        kernel[grid](*arguments, **settings)


def launch(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, others: tuple[Tensor, ...], tau: float, ignore_index: int
) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Return the number of programs, the arguments of a kernel, and its settings.

    Args:
        preds_S, preds_T, target, tau, ignore_index: As for :func:`soft_terms`.
        others: Further tensors of the kernel: logits as (groups, C, targets), values of targets as (groups, targets).
    """
    preds_S, preds_T, target = _rows(preds_S), _rows(preds_T), _flat(target)
    tensors = (preds_S, preds_T, target, *others)
    blocks = _blocks([tensor for tensor in tensors if tensor.dim() == 3])
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    groups, classes, rows = preds_S.shape
    # kernels are in debug mode for their one assertion, not to check each sum of indices for overflow
    settings = {**blocks._asdict(), 'sanitize_overflow': False}
    return (
        (triton.cdiv(rows, blocks.ROWS) * groups,),
        [*tensors, *strides, classes, rows, tau, ignore_index],
        settings,
    )


def _rows(preds: Tensor) -> Tensor:
    """Logits as groups of targets with a constant stride. Shape: (groups, C, targets)."""
    return preds.t().unsqueeze(0) if preds.dim() == 2 else preds.flatten(2)


def _flat(values: Tensor) -> Tensor:
    """Values of targets in the groups of their logits. Shape: (groups, targets)."""
    return values.unsqueeze(0) if values.dim() == 1 else values.flatten(1)


# each is one operator for autograd, torch.compile and fake tensors; ``default`` is every device
_LOGITS = 'Tensor preds_S, Tensor preds_T, Tensor target'
for _function, _empty, _tensors in (
    (soft_terms, _empty_terms, _LOGITS),
    (soft_gradient, _empty_gradient, f'{_LOGITS}, Tensor upstream'),
):
    _name = f'mmwsl::{_function.__name__}'
    torch.library.define(_name, f'({_tensors}, float tau, int ignore_index) -> Tensor')
    torch.library.impl(_name, 'default', _function)
    torch.library.register_fake(_name, _empty)


# ---- on the device


@triton.jit
def _targets(target, t_group, t_row, classes, rows, ignore_index, ROWS: tl.constexpr):
    """Group and rows of this program, the class of each row, and masks of the rows that exist and that count."""
    blocks = tl.cdiv(rows, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.max_contiguous(row, 2)  # a thread that reads more of them has too few registers for their sums
    exists = row < rows
    true = tl.load(target + group * t_group + row * t_row, mask=exists, other=ignore_index)
    known = (true >= 0) & (true < classes)
    tl.device_assert(known | (true == ignore_index), 'a target is neither a class nor ignore_index')
    return group, row, true, exists, known & (true != ignore_index)


@triton.jit
def _read(preds, class_stride, classes, exists, counts, start, BLOCK: tl.constexpr):
    """Logits of a chunk of classes in float32, -inf past the last class and for ignored targets; and their maximum."""
    place = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
    # adjacent logits are read together only under a common mask, which that of ignored targets is not
    logits = tl.load(preds[:, None] + place * class_stride, mask=exists[:, None] & (place < classes), other=0)
    logits = tl.where(counts[:, None] & (place < classes), logits.to(tl.float32), -float('inf'))
    return logits, tl.maximum(tl.max(logits, 1), -3.0e38)  # finite, so that no difference is NaN


@triton.jit
def _sums(preds_S, preds_T, s_class, t_class, classes, exists, counts, true, start, inverse_tau, BLOCK: tl.constexpr):
    """Sums over a chunk of classes, relative to its largest logits, from which the terms are computed."""
    logits_S, max_S = _read(preds_S, s_class, classes, exists, counts, start, BLOCK)
    logits_T, max_T = _read(preds_T, t_class, classes, exists, counts, start, BLOCK)
    behind_S, behind_T = logits_S - max_S[:, None], logits_T - max_T[:, None]
    exp_S, exp_T = tl.exp(behind_S * inverse_tau), tl.exp(behind_T * inverse_tau)
    place = start + tl.arange(0, BLOCK)[None, :]
    others = place != true[:, None]
    others_S = tl.sum(tl.where(others, tl.exp(behind_S), 0.0), 1)
    others_T = tl.sum(tl.where(others, tl.exp(behind_T), 0.0), 1)
    dot = tl.sum(tl.where(counts[:, None] & (place < classes), exp_T * behind_S, 0.0), 1)
    return max_S, tl.sum(exp_S, 1), others_S, max_T, tl.sum(exp_T, 1), others_T, dot


@triton.jit
def _merged(
    max_S,
    sum_S,
    others_S,
    max_T,
    sum_T,
    others_T,
    dot,
    max_S2,
    sum_S2,
    others_S2,
    max_T2,
    sum_T2,
    others_T2,
    dot2,
    inverse_tau,
):
    """Merge the sums of two chunks."""
    top_S, top_T = tl.maximum(max_S, max_S2), tl.maximum(max_T, max_T2)
    down_S, down_S2, down_T, down_T2 = max_S - top_S, max_S2 - top_S, max_T - top_T, max_T2 - top_T
    shrink_T, shrink_T2 = tl.exp(down_T * inverse_tau), tl.exp(down_T2 * inverse_tau)
    dot = (dot + sum_T * down_S) * shrink_T + (dot2 + sum_T2 * down_S2) * shrink_T2
    sum_S = sum_S * tl.exp(down_S * inverse_tau) + sum_S2 * tl.exp(down_S2 * inverse_tau)
    sum_T = sum_T * shrink_T + sum_T2 * shrink_T2
    others_S = others_S * tl.exp(down_S) + others_S2 * tl.exp(down_S2)
    others_T = others_T * tl.exp(down_T) + others_T2 * tl.exp(down_T2)
    return top_S, sum_S, others_S, top_T, sum_T, others_T, dot


@triton.jit
def _hard_loss(others, above):
    """log(1 + e^x) with x = log(others) + above, precise to the last bits even if it is nearly 0."""
    x = tl.log(tl.maximum(others, _SMALLEST)) + above
    small = tl.exp(-tl.abs(x))
    # log(1 + small) = 2 artanh(s), whose series is exact here, unlike the logarithm of a number near 1
    s = small / (2 + small)
    square = s * s
    series = 1 / 15 + square / 17
    series = 1 / 13 + square * series
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    return tl.where(others > 0, tl.maximum(x, 0.0) + 2 * s * (1 + square * series), 0.0)


@triton.jit
def _weight(student, teacher):
    """1 - exp(-student / teacher), precise to the last bits even if it is nearly 0."""
    ratio = student / (teacher + _EPSILON)
    near = tl.minimum(ratio, 0.5)
    series = 1 - near / 8
    series = 1 - near / 7 * series
    series = 1 - near / 6 * series
    series = 1 - near / 5 * series
    series = 1 - near / 4 * series
    series = 1 - near / 3 * series
    series = 1 - near / 2 * series
    return tl.where(ratio < 0.5, near * series, 1 - tl.exp(-ratio))


@triton.jit(debug=True)
def terms_kernel(
    preds_S,
    preds_T,
    target,
    terms,
    s_group,
    s_class,
    s_row,
    t_group,
    t_class,
    t_row,
    y_group,
    y_row,
    term,
    _row,
    classes,
    rows,
    tau,
    ignore_index,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    inverse_tau = 1 / tau
    if ALIGNED > 1:
        classes = classes // ALIGNED * ALIGNED
        s_group, s_row = s_group // ALIGNED * ALIGNED, s_row // ALIGNED * ALIGNED
        t_group, t_row = t_group // ALIGNED * ALIGNED, t_row // ALIGNED * ALIGNED
    group, row, true, exists, counts = _targets(target, y_group, y_row, classes, rows, ignore_index, ROWS)
    preds_S += group * s_group + row * s_row
    preds_T += group * t_group + row * t_row
    max_S, sum_S, others_S, max_T, sum_T, others_T, dot = _sums(
        preds_S, preds_T, s_class, t_class, classes, exists, counts, true, 0, inverse_tau, BLOCK
    )
    if LOOPED:
        for start in range(BLOCK, classes, BLOCK):
            max_S2, sum_S2, others_S2, max_T2, sum_T2, others_T2, dot2 = _sums(
                preds_S, preds_T, s_class, t_class, classes, exists, counts, true, start, inverse_tau, BLOCK
            )
            max_S, sum_S, others_S, max_T, sum_T, others_T, dot = _merged(
                max_S,
                sum_S,
                others_S,
                max_T,
                sum_T,
                others_T,
                dot,
                max_S2,
                sum_S2,
                others_S2,
                max_T2,
                sum_T2,
                others_T2,
                dot2,
                inverse_tau,
            )
    sum_S, sum_T = tl.where(counts, sum_S, 1.0), tl.where(counts, sum_T, 1.0)
    behind_S = tl.load(preds_S + true * s_class, mask=counts, other=0).to(tl.float32) - max_S
    behind_T = tl.load(preds_T + true * t_class, mask=counts, other=0).to(tl.float32) - max_T
    student, teacher = _hard_loss(others_S, -behind_S), _hard_loss(others_T, -behind_T)
    difference = tl.exp(behind_S * inverse_tau) / sum_S - tl.exp(behind_T * inverse_tau) / sum_T
    terms += group * rows + row
    tl.store(terms, tl.where(counts, tau * (tau * tl.log(sum_S) - dot / sum_T), 0.0), mask=exists)
    tl.store(terms + term, tl.where(counts, student, 0.0), mask=exists)
    tl.store(terms + 2 * term, tl.where(counts, teacher, 0.0), mask=exists)
    tl.store(terms + 3 * term, tl.where(counts, difference, 0.0), mask=exists)
    tl.store(terms + 4 * term, tl.where(counts, _weight(student, teacher), 0.0), mask=exists)


@triton.jit
def _softmax(preds, class_stride, classes, exists, counts, start, inverse_tau, BLOCK: tl.constexpr):
    """Exponentials of a chunk of classes, their sum, and the logit that they are relative to."""
    logits, top = _read(preds, class_stride, classes, exists, counts, start, BLOCK)
    exp = tl.exp((logits - top[:, None]) * inverse_tau)
    return exp, tl.sum(exp, 1), top


@triton.jit
def _online(preds, class_stride, classes, exists, counts, inverse_tau, BLOCK: tl.constexpr):
    """Sum of the exponentials of all classes, and the logit that they are relative to."""
    _exp, total, top = _softmax(preds, class_stride, classes, exists, counts, 0, inverse_tau, BLOCK)
    for start in range(BLOCK, classes, BLOCK):
        _exp, total2, top2 = _softmax(preds, class_stride, classes, exists, counts, start, inverse_tau, BLOCK)
        highest = tl.maximum(top, top2)
        total = total * tl.exp((top - highest) * inverse_tau) + total2 * tl.exp((top2 - highest) * inverse_tau)
        top = highest
    return total, top


@triton.jit
def _write(gradient, class_stride, classes, exists, start, probs_S, probs_T, scale, counts, BLOCK: tl.constexpr):
    place = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
    values = tl.where(counts[:, None], scale[:, None] * (probs_S - probs_T), 0.0)
    tl.store(
        gradient[:, None] + place * class_stride,
        values.to(gradient.dtype.element_ty),
        mask=exists[:, None] & (place < classes),
    )


@triton.jit(debug=True)
def gradient_kernel(
    preds_S,
    preds_T,
    target,
    gradient,
    upstream,
    s_group,
    s_class,
    s_row,
    t_group,
    t_class,
    t_row,
    y_group,
    y_row,
    g_group,
    g_class,
    g_row,
    u_group,
    u_row,
    classes,
    rows,
    tau,
    ignore_index,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    inverse_tau = 1 / tau
    if ALIGNED > 1:
        classes = classes // ALIGNED * ALIGNED
        s_group, s_row = s_group // ALIGNED * ALIGNED, s_row // ALIGNED * ALIGNED
        t_group, t_row = t_group // ALIGNED * ALIGNED, t_row // ALIGNED * ALIGNED
        g_group, g_row = g_group // ALIGNED * ALIGNED, g_row // ALIGNED * ALIGNED
    group, row, _true, exists, counts = _targets(target, y_group, y_row, classes, rows, ignore_index, ROWS)
    preds_S += group * s_group + row * s_row
    preds_T += group * t_group + row * t_row
    gradient += group * g_group + row * g_row
    scale = tau * tl.load(upstream + group * u_group + row * u_row, mask=counts, other=0).to(tl.float32)
    if LOOPED:
        total_S, top_S = _online(preds_S, s_class, classes, exists, counts, inverse_tau, BLOCK)
        total_T, top_T = _online(preds_T, t_class, classes, exists, counts, inverse_tau, BLOCK)
        for start in range(0, classes, BLOCK):
            logits_S, _top_S = _read(preds_S, s_class, classes, exists, counts, start, BLOCK)
            logits_T, _top_T = _read(preds_T, t_class, classes, exists, counts, start, BLOCK)
            probs_S = tl.exp((logits_S - top_S[:, None]) * inverse_tau) / total_S[:, None]
            probs_T = tl.exp((logits_T - top_T[:, None]) * inverse_tau) / total_T[:, None]
            _write(gradient, g_class, classes, exists, start, probs_S, probs_T, scale, counts, BLOCK)
    else:
        exp_S, total_S, _top_S = _softmax(preds_S, s_class, classes, exists, counts, 0, inverse_tau, BLOCK)
        exp_T, total_T, _top_T = _softmax(preds_T, t_class, classes, exists, counts, 0, inverse_tau, BLOCK)
        _write(
            gradient,
            g_class,
            classes,
            exists,
            0,
            exp_S / total_S[:, None],
            exp_T / total_T[:, None],
            scale,
            counts,
            BLOCK,
        )
