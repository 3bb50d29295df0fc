"""A frozen teacher of which only the logits are read, run as fast as they stay right."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SPEEDS = ('plain', 'fold', 'bf16', 'compile', 'compile_bf16')
_TOLERANCE = 1e-4
_BF16_TOLERANCE = 0.1  # rounding alone changes a logit by one or two per cent of the largest


def check_speed(speed: str) -> None:
    """Raise ValueError for a speed that is none of SPEEDS."""
    if speed not in SPEEDS:
        raise ValueError(f'teacher_speed should be one of {SPEEDS}, got {speed!r}')


def fast_forward(teacher: nn.Module, inputs: Tensor, speed: str) -> Callable[[Tensor], Tensor] | None:
    """What the teacher does with images, faster.

    Its BatchNorm is folded into the convolutions before it where it predicts with running statistics, weights are laid
    out channels last, and both only where logits stay the same to 1e-4 of the largest. What is asked for beyond that is
    left out, with a warning, where it does not work.

    Args:
        teacher: The network in the mode in which it teaches. It is left as it is; the function holds a copy.
        inputs: A batch to try it on. Shape: (N, C, H, W).
        speed: One of SPEEDS.

    Returns:
        A function from images, (N, C, H, W), to float32 logits, (N, C). None where there is nothing to gain.
    """
    if speed == 'plain' or inputs.dim() != 4:
        return None
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
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
    return _compiled(run, inputs, _TOLERANCE if half is None else _BF16_TOLERANCE)


def _rearranged(teacher: nn.Module, inputs: Tensor, expected: Tensor) -> nn.Module | None:
    """The fastest copy of the teacher that says the same in float32."""
    for change in ((_folded, _channels_last) if _may_fold(teacher) else (_channels_last, )):
        try:
            network = change(copy.deepcopy(teacher)).requires_grad_(False)
            logits = network(inputs, mode='tensor')
        except (RuntimeError, AttributeError):  # folded into a convolution of another shape; a view of this layout
            continue
        if _agree(logits, expected, _TOLERANCE):
            return network
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
