"""Find out whether a teacher does better on the run's images with another normalisation or order of channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Mean and std that public networks were trained with, for pixels from 0 to 255.
_NORMALISATIONS: dict[str, tuple[Any, Any]] = {
    'pixels / 255': (0.0, 255.0),
    'pixels from -1 to 1': (127.5, 127.5),
    'pixels from 0 to 255': (0.0, 1.0),
    "ImageNet's mean and std": _IMAGENET,
    "ImageNet's mean alone (Caffe)": (_IMAGENET[0], 1.0),
}
_POINTS, _ERRORS = 0.05, 3.0  # "clearly better": by more than so much, and by more than so many standard errors


def better_input(
    network: Callable[[Tensor], Tensor], right: float, inputs: Tensor, target: Tensor, preprocessor: nn.Module
) -> tuple[str, float] | None:
    """Return the input with which a teacher is clearly better, or None if the present one is right.

    Args:
        network: From normalised images to the teacher's logits, without an adapter between the student's kind of input
            and the teacher's.
        right: The teacher's accuracy on these images as they are, in [0, 1].
        inputs: The student's images. Shape: (N, C, H, W).
        target: Their classes, on the CPU. Shape: (N, ).
        preprocessor: The student's data preprocessor.

    Returns:
        What to change about the teacher's input, and its accuracy then, in [0, 1]; None if nothing is better by more
        than 5 points and three standard errors of these images.
    """
    tried = {name: _accuracy(network(other), target) for name, other in _others(inputs, preprocessor)}
    name = max(tried, key=lambda name: tried[name], default=None)
    if name is None:
        return None
    error = math.sqrt(sum(share * (1 - share) for share in (tried[name], right)) / len(target))
    return (name, tried[name]) if tried[name] - right > max(_POINTS, _ERRORS * error) else None


def _others(inputs: Tensor, preprocessor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield changes of the input, each in words and with the images after it."""
    if inputs.dim() != 4 or getattr(preprocessor, 'mean', None) is None:
        return
    mean, std = (torch.as_tensor(value).to(inputs) for value in (preprocessor.mean, preprocessor.std))
    pixels, colour = inputs * std + mean, inputs.shape[1] == 3
    if colour:
        yield 'the other order of channels (to_rgb)', (pixels.flip(1) - mean) / std
    for name, (other_mean, other_std) in _NORMALISATIONS.items():
        if not colour and isinstance(other_mean, tuple):
            continue
        shape = (1, -1, 1, 1)
        centre, spread = (torch.as_tensor(value).to(inputs).reshape(shape) for value in (other_mean, other_std))
        yield name, (pixels - centre) / spread
        if colour:
            yield f'{name}, in the other order of channels (to_rgb)', (pixels.flip(1) - centre) / spread


def _accuracy(logits: Tensor, target: Tensor) -> float:
    return float((logits.argmax(1).cpu() == target).double().mean())
