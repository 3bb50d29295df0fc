"""A teacher's own kind of input, made from the student's."""
from __future__ import annotations

import torch
from torch import Tensor, nn


class InputAdapter:
    """Forward pre-hook: the student's normalised input, as the teacher's own preprocessor would have made it."""

    def __init__(self, scale: Tensor, shift: Tensor, flip: bool) -> None:
        self.scale, self.shift, self.flip = scale, shift, flip

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self.adapt(args[0]), *args[1:]), kwargs
        return args, {**kwargs, 'inputs': self.adapt(kwargs['inputs'])}

    def adapt(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flip(1) if self.flip and inputs.shape[1] == 3 else inputs
        self.scale, self.shift = self.scale.to(inputs.device), self.shift.to(inputs.device)  # a copy, once
        return inputs * self.scale.to(inputs) + self.shift.to(inputs)


def input_adapter(own: nn.Module, shared: nn.Module, normalises: bool = False) -> InputAdapter | None:
    """The affine map from the student's input to the teacher's, so that both see the same crop and the same mixture.

    Args:
        own: The teacher's preprocessor.
        shared: The student's.
        normalises: Whether the teacher's preprocessor counts even without mean and std: it then wants raw pixels.
            Otherwise such a teacher takes the student's input as it is.

    Returns:
        A forward pre-hook with keyword arguments, or None if the two inputs are the same.

    Raises:
        ValueError: If only the teacher's preprocessor normalises, if the two differ in their number of channels, or if
            the student's pads, which no map of pixels can undo.
    """
    student, teacher = _normalisation(shared), _normalisation(own)
    if teacher is None:
        if not normalises:
            return None
        if student is None:
            return InputAdapter(torch.ones(1), torch.zeros(1), True) if _swaps(own) != _swaps(shared) else None
        teacher = torch.zeros_like(student[0]), torch.ones_like(student[1])
    if student is None:
        raise ValueError('the teacher comes with a data_preprocessor that normalises and the student with one that '
                         'does not: give the student mean and std too (mean 0 and std 1 change nothing)')
    return _affine_map(student, teacher, shared, _swaps(own) != _swaps(shared))


def _affine_map(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], shared: nn.Module,
                swap: bool) -> InputAdapter | None:
    (mean, std), (own_mean, own_std) = student, teacher
    if own_mean.shape != mean.shape:
        raise ValueError(f"the teacher's data_preprocessor is for {len(own_mean)} channels and the student's for "
                         f'{len(mean)}')
    flip = swap and len(mean) == 3
    if flip:  # the student's statistics, in the teacher's channel order
        mean, std = mean.flip(0), std.flip(0)
    if not flip and torch.equal(own_mean, mean) and torch.equal(own_std, std):
        return None
    if getattr(shared, 'pad_size_divisor', 1) > 1:
        raise ValueError("the teacher's data_preprocessor normalises otherwise than the student's, which also pads "
                         f'(pad_size_divisor={shared.pad_size_divisor}): pad in the pipeline instead')
    return InputAdapter(std / own_std, (mean - own_mean) / own_std, flip)


def _normalisation(preprocessor: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and std of mmpretrain's and of mmengine's preprocessors."""
    if getattr(preprocessor, 'mean', None) is None:
        return None
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device='cpu')
                 for value in (preprocessor.mean, preprocessor.std))
    return mean, std


def _swaps(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, 'to_rgb', False) or getattr(preprocessor, '_channel_conversion', False))
