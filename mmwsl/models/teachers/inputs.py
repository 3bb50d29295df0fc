"""Convert the student's input to the one that a teacher expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class InputAdapter:
    """Forward pre-hook that converts the student's normalised input to that of the teacher's own preprocessor.

    A preprocessor pads after it has normalised, so the area outside an image is filled with the teacher's padding.

    Args:
        scale, shift: The affine map of each channel. Shape: (C, 1, 1) or (1, ).
        flip: Whether to reverse the order of three channels.
        padding: The teacher's value outside an image; None if images have no padding.
    """

    def __init__(self, scale: Tensor, shift: Tensor, flip: bool, padding: float | None = None) -> None:
        self.scale, self.shift, self.flip, self.padding = scale, shift, flip, padding

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = {**dict(zip(('inputs', 'data_samples'), args, strict=False)), **kwargs}
        inputs = self._padded(self.adapt(given['inputs']), given.get('data_samples'))
        return ((inputs, *args[1:]), kwargs) if args else (args, {**kwargs, 'inputs': inputs})

    def _padded(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor:
        """Fill the area below and to the right of images that are smaller than the batch. Shape: as inputs."""
        size = tuple(inputs.shape[2:])
        if self.padding is None:
            return inputs
        shapes = [tuple(sample.metainfo.get('img_shape', size)[:2]) for sample in data_samples or ()]
        for image, (height, width) in zip(inputs, shapes, strict=False):  # inputs are new: adapt made them
            if (height, width) != size:
                image[:, height:] = image[:, :, width:] = self.padding
        return inputs

    def adapt(self, inputs: Tensor) -> Tensor:
        """Return the converted images, without regard to padding. Shape: (N, C, H, W), as inputs."""
        inputs = inputs.flip(1) if self.flip and inputs.shape[1] == 3 else inputs
        self.scale, self.shift = self.scale.to(inputs.device), self.shift.to(inputs.device)  # copied once
        return inputs * self.scale.to(inputs) + self.shift.to(inputs)


def input_adapter(own: nn.Module, shared: nn.Module, normalises: bool = False) -> InputAdapter | None:
    """Return the affine map from the student's input to the teacher's, so that both see the same crops and mixtures.

    Args:
        own: The teacher's preprocessor.
        shared: The student's preprocessor.
        normalises: Whether a teacher's preprocessor without mean and std means that the teacher expects raw pixels.
            Otherwise such a teacher receives the student's input unchanged.

    Returns:
        A forward pre-hook with keyword arguments, or None if the two inputs are the same.

    Raises:
        ValueError: If only the teacher's preprocessor normalises, or if the two differ in their number of channels.
    """
    student, teacher = _normalisation(shared), _normalisation(own)
    if teacher is None:
        if not normalises:
            return None
        if student is None:
            return InputAdapter(torch.ones(1), torch.zeros(1), True) if _swaps(own) != _swaps(shared) else None
        teacher = torch.zeros_like(student[0]), torch.ones_like(student[1])
    if student is None:
        raise ValueError(
            "the teacher's data_preprocessor normalises images and the student's does not: set mean and std of the "
            "student's as well (mean 0 and std 1 change nothing)"
        )
    padding = _padding(own) if _pads(shared) else None
    return _affine_map(student, teacher, _swaps(own) != _swaps(shared), padding)


def _affine_map(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], swap: bool, padding: float | None
) -> InputAdapter | None:
    (mean, std), (own_mean, own_std) = student, teacher
    if own_mean.shape != mean.shape:
        raise ValueError(
            f"the teacher's data_preprocessor has {len(own_mean)} channels and the student's {len(mean)}: set mean "
            'and std of one length'
        )
    flip = swap and len(mean) == 3
    if flip:  # the student's statistics, in the teacher's channel order
        mean, std = mean.flip(0), std.flip(0)
    if not flip and torch.equal(own_mean, mean) and torch.equal(own_std, std):
        return None
    return InputAdapter(std / own_std, (mean - own_mean) / own_std, flip, padding)


def _normalisation(preprocessor: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and std of a preprocessor of mmpretrain or mmengine; None if it does not normalise."""
    if getattr(preprocessor, 'mean', None) is None:
        return None
    mean, std = (
        torch.as_tensor(value, dtype=torch.float32, device='cpu') for value in (preprocessor.mean, preprocessor.std)
    )
    return mean, std


def _padding(preprocessor: nn.Module) -> float:
    """The value with which a preprocessor pads, after it has normalised; mmseg's has another name."""
    return float(getattr(preprocessor, 'pad_val', getattr(preprocessor, 'pad_value', 0)))


def _pads(preprocessor: nn.Module) -> bool:
    """Whether a batch may hold images that do not fill it; ``img_shape`` is then their size, as in mmseg and mmdet."""
    return (
        getattr(preprocessor, 'pad_size_divisor', 1) > 1
        or getattr(preprocessor, 'size', None) is not None
        or hasattr(preprocessor, 'pad_mask')
    )


def _swaps(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, 'to_rgb', False) or getattr(preprocessor, '_channel_conversion', False))
