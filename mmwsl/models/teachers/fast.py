"""Accelerated inference for a frozen teacher when only its output is needed."""

from __future__ import annotations

import copy
import statistics
import time
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
_TF32_TOLERANCE = 1e-2  # a GPU's convolutions round to TF32 by default, differently in each form of a network: by 1e-3
_BF16_TOLERANCE = 0.1  # rounding alone changes a logit by one or two per cent of the largest
_Forward = Callable[..., Any]  # of images and data samples, as in fast_forward
_Batch = tuple[Tensor, list | None]


def check_speed(speed: str) -> None:
    """Raise ValueError unless the speed is one of SPEEDS."""
    if speed not in SPEEDS:
        raise ValueError(f'teacher_speed should be one of {SPEEDS}, got {speed!r}')


def fast_forward(teacher: nn.Module, inputs: Tensor, speed: str, data_samples: list | None = None) -> _Forward | None:
    """Return a function that computes the teacher's output faster, or None if there is nothing to gain.

    BatchNorm that predicts with running statistics is folded into the preceding convolution, and weights are laid out
    channels last. Either is done only if logits stay the same to 1e-4 of the largest in float32 and, under autocast,
    within the error that its type causes in the network anyway. On a GPU the fastest of these forms is chosen, which
    may be the unchanged network. The choice is logged, with its time, the network's time and the memory of the copy.
    bfloat16 and torch.compile are skipped with a warning if they do not work.

    Args:
        teacher: The network in the mode in which it teaches. It is not changed; the function holds a copy.
        inputs: A batch to try it on. Shape: (N, C, H, W).
        speed: One of SPEEDS.
        data_samples: Data samples of the batch, for a network that needs them.

    Returns:
        A function of images, (N, C, H, W), and data samples that returns the teacher's output in ``mode='tensor'``:
        logits, (N, C), or a tuple, list or dict of tensors, each of which was compared; under autocast in its type.
    """
    if speed == 'plain' or inputs.dim() != 4:
        return None
    batch: _Batch = inputs, data_samples
    mixed = torch.is_autocast_enabled(inputs.device.type)
    with torch.no_grad(), _precisely(inputs):
        expected = teacher(*batch, mode='tensor')
    if not _is_finite(expected):
        return None
    with torch.no_grad():
        network = _rearranged(teacher, batch, expected)
    with torch.no_grad(), _precisely(inputs):
        half = _in_bf16(network or teacher, batch, expected) if 'bf16' in speed else None
    if half is None and network is None and 'compile' not in speed:
        return None
    run = _runner(half or network or copy.deepcopy(teacher), half is not None)
    if 'compile' not in speed:
        return run
    tolerance = _BF16_TOLERANCE if mixed or half is not None else _TF32_TOLERANCE if inputs.is_cuda else _TOLERANCE
    return _compiled(run, (inputs.detach(), data_samples), tolerance)


@contextmanager
def _precisely(inputs: Tensor) -> Iterator[None]:
    """Switch off autocast and TF32, so that forms of a network are compared without their rounding."""
    switches = _tf32_switches()
    before = [read() for read, _, _ in switches]
    try:
        for _, write, exact in switches:
            write(exact)
        with torch.autocast(inputs.device.type, enabled=False):
            yield
    finally:
        for (_, write, _), value in zip(switches, before, strict=True):
            write(value)


_Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]


def _tf32_switches() -> list[_Switch]:
    """Functions that read and set the precision of matrix products and of convolutions, and its value without TF32."""

    def attribute(owner: Any, name: str, exact: Any) -> _Switch:
        return partial(getattr, owner, name), partial(setattr, owner, name), exact

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, 'conv'):  # torch 2.9 and later; the older switches cannot be read once one of these is set
        return [attribute(matmul, 'fp32_precision', 'ieee'), attribute(cudnn.conv, 'fp32_precision', 'ieee')]
    return [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, 'highest'),
        attribute(cudnn, 'allow_tf32', False),
    ]


def _rearranged(teacher: nn.Module, batch: _Batch, expected: Any) -> nn.Module | None:
    """The fastest copy of the teacher with the same output; None if the teacher itself is the fastest."""
    reasons: list[str] = []
    forms = _right_forms(teacher, batch, expected, reasons)
    plain = _milliseconds(teacher, batch)
    timed = [(_milliseconds(network, batch), form, network) for form, network in forms]
    fastest = min(timed, key=lambda entry: entry[0], default=None)
    if fastest is None or (batch[0].is_cuda and fastest[0] >= plain):
        reasons += [f'{form}: takes {needed:.3g} ms' for needed, form, _ in timed]
        print_log(f'The teacher runs unchanged, {plain:.3g} ms a batch. {"; ".join(reasons)}.', logger='current')
        return None
    needed, form, network = fastest
    print_log(
        f'The teacher runs with {form}: {needed:.3g} ms a batch, instead of {plain:.3g}. The copy takes '
        f'{_megabytes(network):.3g} MB more.',
        logger='current',
    )
    return network


def _right_forms(
    teacher: nn.Module, batch: _Batch, expected: Any, reasons: list[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the teacher with the same output, by name; reasons against others are added to ``reasons``.

    On a CPU only the first is tried: it is the fastest, and a run's result should not depend on a clock.
    """
    on_gpu = batch[0].is_cuda
    for form, change in _FORMS.items():
        if change is not _channels_last and not _may_fold(teacher):
            continue
        try:
            network = change(copy.deepcopy(teacher)).requires_grad_(False)
            with _precisely(batch[0]):
                output = network(*batch, mode='tensor')
            is_right = _agree(output, expected, _TOLERANCE) and _is_right_in_use(network, teacher, batch, expected)
        except (RuntimeError, AttributeError) as error:  # folded into another shape; a view of this layout
            reasons.append(f'{form}: {error}')
            continue
        if not is_right:
            reasons.append(f'{form}: changes its logits')
            continue
        yield form, network
        if not on_gpu:
            return


def _is_right_in_use(network: nn.Module, teacher: nn.Module, batch: _Batch, expected: Any) -> bool:
    """Whether a copy under autocast is as close to float32 as the teacher: folded weights may round differently."""
    if not torch.is_autocast_enabled(batch[0].device.type):
        return True
    errors = [_errors(form(*batch, mode='tensor'), expected) for form in (network, teacher)]
    return bool(torch.all(errors[0] <= 2 * errors[1] + _TF32_TOLERANCE))


def _errors(output: Any, expected: Any) -> Tensor:
    """The largest difference in each tensor of a tree, as a share of its largest value."""
    return torch.stack(
        [
            (leaf.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-12)
            for leaf, wanted in zip(tree_leaves(output), tree_leaves(expected), strict=True)
            if leaf.numel()
        ]
    )


def _milliseconds(network: nn.Module, batch: _Batch) -> float:
    """Time of a pass in the precision of the run: on a GPU the median of five after a warm-up, on a CPU of one."""
    if not batch[0].is_cuda:
        started = time.perf_counter()
        network(*batch, mode='tensor')
        return 1e3 * (time.perf_counter() - started)
    passes = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        network(*batch, mode='tensor')
        end.record()
        torch.cuda.synchronize()
        passes.append(begin.elapsed_time(end))
    return statistics.median(passes[2:])


def _megabytes(network: nn.Module) -> float:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _may_fold(teacher: nn.Module) -> bool:
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    return bool(norms) and not any(norm.training for norm in norms)


def _folded(teacher: nn.Module) -> nn.Module:
    return fuse_conv_bn(teacher)


def _folded_channels_last(teacher: nn.Module) -> nn.Module:
    return _channels_last(_folded(teacher))


def _channels_last(teacher: nn.Module) -> nn.Module:
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'its BatchNorm folded into convolutions, channels last': _folded_channels_last,
    'channels last': _channels_last,
    'its BatchNorm folded into convolutions': _folded,
}


def _is_finite(output: Any) -> bool:
    """Whether an output is a tree of tensors without inf or nan."""
    return all(isinstance(leaf, Tensor) and torch.isfinite(leaf).all() for leaf in tree_leaves(output))


def _agree(output: Any, expected: Any, tolerance: float) -> bool:
    """Whether two trees of tensors are equal, each tensor to a share of its largest value."""
    (leaves, form), (wanted, wanted_form) = tree_flatten(output), tree_flatten(expected)
    return form == wanted_form and all(map(partial(_are_close, tolerance), leaves, wanted))


def _are_close(tolerance: float, leaf: Tensor, expected: Tensor) -> bool:
    if leaf.shape != expected.shape or not leaf.numel():
        return leaf.shape == expected.shape
    leaf, expected = leaf.float(), expected.float()  # a mask cannot be subtracted
    return bool((leaf - expected).abs().max() <= tolerance * expected.abs().max())  # false for nan


def _in_bf16(teacher: nn.Module, batch: _Batch, expected: Any) -> nn.Module | None:
    if batch[0].is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn(
            f'the teacher runs in float32, because the {torch.cuda.get_device_name()} does not support bfloat16',
            UserWarning,
            stacklevel=2,
        )
        return None
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
            return tree_map(Tensor.contiguous, network(inputs, data_samples, mode='tensor'))
        with torch.autocast(inputs.device.type, enabled=False):
            return tree_map(_in_full, network(inputs.to(torch.bfloat16), data_samples, mode='tensor'))

    return run  # contiguous even if the network is channels last: losses of MMRazor call view()


def _in_full(leaf: Tensor) -> Tensor:
    return (leaf.float() if leaf.is_floating_point() else leaf).contiguous()


def _compiled(run: _Forward, batch: _Batch, tolerance: float) -> _Forward:
    compiled = torch.compile(run)
    torch._dynamo.maybe_mark_dynamic(batch[0], 0)  # an epoch's last batch is smaller
    try:
        with torch.no_grad():
            if _agree(compiled(*batch), run(*batch), tolerance):
                return compiled
        reason = f'changes a logit by more than {tolerance} of the largest'
    except Exception as error:  # each backend raises its own: no compiler, an unknown operator
        reason = f'fails here ({error})'
    warnings.warn(
        f"the teacher runs without torch.compile, which {reason}. Remove 'compile' from teacher_speed to silence this",
        UserWarning,
        stacklevel=3,
    )
    return run
