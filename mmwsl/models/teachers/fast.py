"""Accelerated inference for a frozen teacher when only its output is needed."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

SPEEDS = ('plain', 'fold', 'bf16', 'compile', 'compile_bf16')
_TOLERANCE = 1e-4
_TF32_TOLERANCE = 1e-2  # a GPU's convolutions round to TF32 by default, each form of a network otherwise: by 1e-3
_BF16_TOLERANCE = 0.1  # rounding alone changes a logit by one or two per cent of the largest
_Forward = Callable[..., Any]  # of images and data samples, as in fast_forward
_Batch = tuple[Tensor, list | None]


def check_speed(speed: str) -> None:
    """Raise ValueError for a speed that is none of SPEEDS."""
    if speed not in SPEEDS:
        raise ValueError(f'teacher_speed should be one of {SPEEDS}, got {speed!r}')


def fast_forward(teacher: nn.Module, inputs: Tensor, speed: str, data_samples: list | None = None) -> _Forward | None:
    """What the teacher does with images, faster.

    Its BatchNorm is folded into the convolutions before it where it predicts with running statistics, weights are laid
    out channels last, and both only where logits stay the same to 1e-4 of the largest in float32. What is asked for
    beyond that is left out, with a warning, where it does not work.

    Args:
        teacher: The network in the mode in which it teaches. It is left as it is; the function holds a copy.
        inputs: A batch to try it on. Shape: (N, C, H, W).
        speed: One of SPEEDS.
        data_samples: Those of the batch, for a network that needs them.

    Returns:
        A function from images, (N, C, H, W), and data samples to what the teacher outputs in ``mode='tensor'``: logits,
        (N, C), or a tuple, list or dict of tensors, each compared by itself; under autocast in its type. None where
        there is nothing to gain.
    """
    if speed == 'plain' or inputs.dim() != 4:
        return None
    batch: _Batch = inputs, data_samples
    mixed = torch.is_autocast_enabled(inputs.device.type)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), _without_tf32():
        expected = teacher(*batch, mode='tensor')
        if not _is_finite(expected):
            return None
        network = _rearranged(teacher, batch, expected)
        half = _in_bf16(network or teacher, batch, expected) if 'bf16' in speed else None
    if half is None and network is None and 'compile' not in speed:
        return None
    run = _runner(half or network or copy.deepcopy(teacher), half is not None)
    if 'compile' not in speed:
        return run
    tolerance = _BF16_TOLERANCE if mixed or half is not None else _TF32_TOLERANCE if inputs.is_cuda else _TOLERANCE
    return _compiled(run, (inputs.detach(), data_samples), tolerance)

@contextmanager
def _without_tf32() -> Iterator[None]:
    """Compare forms of a network by what they compute, not by how a GPU rounds it."""
    switches = _tf32_switches()
    before = [read() for read, _, _ in switches]
    try:
        for _, write, exact in switches:
            write(exact)
        yield
    finally:
        for (_, write, _), value in zip(switches, before, strict=True):
            write(value)


_Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]


def _tf32_switches() -> list[_Switch]:
    """How the precision of matrix products and of convolutions is read and set, and its value without TF32."""
    def attribute(owner: Any, name: str, exact: Any) -> _Switch:
        return partial(getattr, owner, name), partial(setattr, owner, name), exact
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, 'conv'):  # torch 2.9 and later; the older switches cannot be read where one of these was set
        return [attribute(matmul, 'fp32_precision', 'ieee'), attribute(cudnn.conv, 'fp32_precision', 'ieee')]
    return [(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, 'highest'),
            attribute(cudnn, 'allow_tf32', False)]


def _rearranged(teacher: nn.Module, batch: _Batch, expected: Any) -> nn.Module | None:
    """The fastest copy of the teacher that says the same in float32."""
    reasons = []
    changes = {'its BatchNorm folded into convolutions, channels last': _folded, 'channels last': _channels_last}
    for form, change in changes.items():
        if change is _folded and not _may_fold(teacher):
            continue
        try:
            network = change(copy.deepcopy(teacher)).requires_grad_(False)
            output = network(*batch, mode='tensor')
        except (RuntimeError, AttributeError) as error:  # folded into another shape; a view of this layout
            reasons.append(f'{form}: {error}')
            continue
        if _agree(output, expected, _TOLERANCE):
            print_log(f'The teacher runs with {form}.', logger='current')
            return network
        reasons.append(f'{form}: changes its logits')
    print_log(f'The teacher runs as it is. {"; ".join(reasons)}.', logger='current')
    return None


def _may_fold(teacher: nn.Module) -> bool:
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    return bool(norms) and not any(norm.training for norm in norms)


def _folded(teacher: nn.Module) -> nn.Module:
    return _channels_last(fuse_conv_bn(teacher))


def _channels_last(teacher: nn.Module) -> nn.Module:
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _is_finite(output: Any) -> bool:
    """Whether it is a tree of tensors without inf or nan."""
    return all(isinstance(leaf, Tensor) and torch.isfinite(leaf).all() for leaf in tree_leaves(output))


def _agree(output: Any, expected: Any, tolerance: float) -> bool:
    """Whether two trees of tensors are the same, each tensor to a share of its largest value."""
    (leaves, form), (wanted, wanted_form) = tree_flatten(output), tree_flatten(expected)
    return form == wanted_form and all(map(partial(_are_close, tolerance), leaves, wanted))


def _are_close(tolerance: float, leaf: Tensor, expected: Tensor) -> bool:
    if leaf.shape != expected.shape or not leaf.numel():
        return leaf.shape == expected.shape
    leaf, expected = leaf.float(), expected.float()  # a mask cannot be subtracted
    return bool((leaf - expected).abs().max() <= tolerance * expected.abs().max())  # false for nan


def _in_bf16(teacher: nn.Module, batch: _Batch, expected: Any) -> nn.Module | None:
    network = copy.deepcopy(teacher).to(torch.bfloat16)
    try:
        if _agree(_runner(network, True)(*batch), expected, _BF16_TOLERANCE):
            return network
        reason = f'changes a logit by more than {_BF16_TOLERANCE} of the largest'
    except RuntimeError as error:
        reason = f'fails ({error})'
    warnings.warn(f'the teacher runs in float32, because bfloat16 {reason}', UserWarning, stacklevel=2)
    return None


def _runner(network: nn.Module, half: bool) -> _Forward:
    def run(inputs: Tensor, data_samples: list | None = None) -> Any:
        if not half:
            return network(inputs, data_samples, mode='tensor')
        with torch.autocast(inputs.device.type, enabled=False):
            return tree_map(_in_full, network(inputs.to(torch.bfloat16), data_samples, mode='tensor'))
    return run


def _in_full(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.is_floating_point() else leaf


def _compiled(run: _Forward, batch: _Batch, tolerance: float) -> _Forward:
    compiled = torch.compile(run)
    torch._dynamo.maybe_mark_dynamic(batch[0], 0)  # an epoch's last batch is smaller
    try:
        with torch.no_grad():
            if _agree(compiled(*batch), run(*batch), tolerance):
                return compiled
        reason = f'changes a logit by more than {tolerance} of the largest'
    except Exception as error:  # each backend has its own: no compiler, an operator that it does not know
        reason = f'fails here ({error})'
    warnings.warn(f"the teacher runs without torch.compile, which {reason}. teacher_speed without 'compile' is silent "
                  'about it', UserWarning, stacklevel=3)
    return run
