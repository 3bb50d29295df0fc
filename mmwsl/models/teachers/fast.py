"""A frozen teacher of which only the logits are read, run as fast as they stay right."""
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

SPEEDS = ('plain', 'fold', 'bf16', 'compile', 'compile_bf16')
_TOLERANCE = 1e-4
_TF32_TOLERANCE = 1e-2  # a GPU's convolutions round to TF32 by default, each form of a network otherwise: by 1e-3
_BF16_TOLERANCE = 0.1  # rounding alone changes a logit by one or two per cent of the largest


def check_speed(speed: str) -> None:
    """Raise ValueError for a speed that is none of SPEEDS."""
    if speed not in SPEEDS:
        raise ValueError(f'teacher_speed should be one of {SPEEDS}, got {speed!r}')


def fast_forward(teacher: nn.Module, inputs: Tensor, speed: str) -> Callable[[Tensor], Tensor] | None:
    """What the teacher does with images, faster.

    Its BatchNorm is folded into the convolutions before it where it predicts with running statistics, weights are laid
    out channels last, and both only where logits stay the same to 1e-4 of the largest in float32. What is asked for
    beyond that is left out, with a warning, where it does not work.

    Args:
        teacher: The network in the mode in which it teaches. It is left as it is; the function holds a copy.
        inputs: A batch to try it on. Shape: (N, C, H, W).
        speed: One of SPEEDS.

    Returns:
        A function from images, (N, C, H, W), to logits, (N, C); under autocast in its type. None where there is nothing
        to gain.
    """
    if speed == 'plain' or inputs.dim() != 4:
        return None
    mixed = torch.is_autocast_enabled(inputs.device.type)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), _without_tf32():
        expected = teacher(inputs, mode='tensor')
        if not isinstance(expected, Tensor) or not torch.isfinite(expected).all():
            return None
        network = _rearranged(teacher, inputs, expected)
        half = _in_bf16(network or teacher, inputs, expected) if 'bf16' in speed else None
    if half is None and network is None and 'compile' not in speed:
        return None
    run = _runner(half or network or copy.deepcopy(teacher), half is not None)
    if 'compile' not in speed:
        return run
    tolerance = _BF16_TOLERANCE if mixed or half is not None else _TF32_TOLERANCE if inputs.is_cuda else _TOLERANCE
    return _compiled(run, inputs.detach(), tolerance)


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


def _rearranged(teacher: nn.Module, inputs: Tensor, expected: Tensor) -> nn.Module | None:
    """The fastest copy of the teacher that says the same in float32."""
    reasons = []
    changes = {'its BatchNorm folded into convolutions, channels last': _folded, 'channels last': _channels_last}
    for form, change in changes.items():
        if change is _folded and not _may_fold(teacher):
            continue
        try:
            network = change(copy.deepcopy(teacher)).requires_grad_(False)
            logits = network(inputs, mode='tensor')
        except (RuntimeError, AttributeError) as error:  # folded into another shape; a view of this layout
            reasons.append(f'{form}: {error}')
            continue
        if _agree(logits, expected, _TOLERANCE):
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


def _agree(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())  # false for nan


def _in_bf16(teacher: nn.Module, inputs: Tensor, expected: Tensor) -> nn.Module | None:
    network = copy.deepcopy(teacher).to(torch.bfloat16)
    try:
        if _agree(_runner(network, True)(inputs), expected, _BF16_TOLERANCE):
            return network
        reason = f'changes a logit by more than {_BF16_TOLERANCE} of the largest'
    except RuntimeError as error:
        reason = f'fails ({error})'
    warnings.warn(f'the teacher runs in float32, because bfloat16 {reason}', UserWarning, stacklevel=2)
    return None


def _runner(network: nn.Module, half: bool) -> Callable[[Tensor], Tensor]:
    def run(inputs: Tensor) -> Tensor:
        if not half:
            return network(inputs, mode='tensor')
        with torch.autocast(inputs.device.type, enabled=False):
            return network(inputs.to(torch.bfloat16), mode='tensor').float()
    return run


def _compiled(run: Callable[[Tensor], Tensor], inputs: Tensor, tolerance: float) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(run)
    torch._dynamo.maybe_mark_dynamic(inputs, 0)  # an epoch's last batch is smaller
    try:
        with torch.no_grad():
            if _agree(compiled(inputs), run(inputs), tolerance):
                return compiled
        reason = f'changes a logit by more than {tolerance} of the largest'
    except Exception as error:  # each backend has its own: no compiler, an operator that it does not know
        reason = f'fails here ({error})'
    warnings.warn(f"the teacher runs without torch.compile, which {reason}. teacher_speed without 'compile' is silent "
                  'about it', UserWarning, stacklevel=3)
    return run
