"""Weights that show what a weight does, by taking part of it away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmwsl.models.weightings.base import SampleWeighting, build_weighting, inherit
from mmwsl.models.weightings.batch import SampleBatch
from mmwsl.registry import MODELS


@MODELS.register_module()
class UniformWeighting(SampleWeighting):
    """1 for every target: the loss as it is.

    Examples:
        >>> UniformWeighting()(SampleBatch(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 1])))
        tensor([1., 1.])
    """

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Shape: (N, \*)."""
        return torch.ones_like(batch.kept, dtype=batch.dtype)


@MODELS.register_module()
class MeanWeighting(SampleWeighting):
    """The mean of another weight over the batch, for every target: its scale without its choice.

    Args:
        of: Config of the weighting. Default: WSL's.

    Examples:
        >>> student, teacher = torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.zeros(2, 2)
        >>> MeanWeighting()(SampleBatch(student, teacher, torch.tensor([0, 0])))  # of nearly 1 and nearly 0
        tensor([0.5001, 0.5001])
    """

    def __init__(self, of: Any = None) -> None:
        super().__init__()
        self.of = build_weighting(of or dict(type='WSLWeighting'))
        inherit(self, [self.of])

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Shape: (N, \*), or (N, C, \*) of a weight per class."""
        weight = self.of(batch)
        return batch.mean(weight).expand_as(weight)


@MODELS.register_module()
class ShuffledWeighting(SampleWeighting):
    """The weights of a batch, handed to its targets in random order: its distribution without its choice.

    It draws from a generator of its own, so that dropout and augmentations draw the same numbers without it. It is
    seeded whenever torch is (by ``mmwsl.EpochSeedHook`` at each epoch), so that a resumed run repeats an unbroken one.
    In a graph of torch.compile or CUDA, which knows no other, it draws from torch's.

    Args:
        of: Config of the weighting. Default: WSL's.

    Examples:
        >>> student, teacher = torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.zeros(2, 2)
        >>> ShuffledWeighting()(SampleBatch(student, teacher, torch.tensor([0, 0]))).sort().values
        tensor([1.7802e-04, 1.0000e+00])
    """

    def __init__(self, of: Any = None) -> None:
        super().__init__()
        self.of = build_weighting(of or dict(type='WSLWeighting'))
        inherit(self, [self.of])
        self._generator: torch.Generator | None = None
        self._seed = -1

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Shape: (N, \*), or (N, C, \*) of a weight per class."""
        weight = self.of(batch)
        return permuted(weight, batch.kept.expand_as(weight), self._drawn_from(weight.device))

    def _drawn_from(self, device: torch.device) -> torch.Generator | None:
        if torch.compiler.is_compiling() or (device.type == 'cuda' and torch.cuda.is_current_stream_capturing()):
            return None
        if device.type == 'meta':  # has no generator
            device = torch.device('cpu')
        if self._generator is None or self._seed != torch.initial_seed() or self._generator.device != device:
            self._seed = torch.initial_seed()
            self._generator = torch.Generator(device).manual_seed((self._seed + 1) % 2**63)  # not torch's own numbers
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_generator': None}  # type: ignore[misc]  # cannot be pickled


def permuted(weight: Tensor, kept: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same weights over the targets kept, in another order. Two sorts, so that nothing waits for a device.

    Args:
        weight: Any shape.
        kept: Which of them take part. Shape: as weight.
        generator: On the device of weight. None: torch's own.
    """
    flat, kept = weight.flatten(), kept.flatten()
    keys = torch.rand(flat.shape, generator=generator, device=flat.device)
    order = (keys + ~kept).argsort()  # those kept first, in random order
    places = (~kept).to(torch.uint8).argsort(stable=True)  # those kept first, in their own order
    return torch.empty_like(flat).index_copy_(0, places, flat[order]).view_as(weight)


@MODELS.register_module()
class RegularizationWeighting(SampleWeighting):
    r"""1 for regularization samples or for all others, 0 elsewhere (arXiv 2102.00650, Sec. 3; \|b\| > \|a\|).

    Args:
        keep: 'others' drops the regularization samples, 'regularization' leaves them alone.

    Examples:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()  # a = -0.5, b = 0.25
        >>> RegularizationWeighting(keep='others')(SampleBatch(student, teacher, torch.tensor([0])))
        tensor([1.])
    """

    needs_classes = True

    def __init__(self, keep: str = 'others') -> None:
        super().__init__()
        if keep not in ('others', 'regularization'):
            raise ValueError(f"keep should be 'others' or 'regularization', got {keep!r}")
        self.keep = keep

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Shape: (N, \*)."""
        return (batch.is_regularization == (self.keep == 'regularization')).to(batch.dtype)

    def extra_repr(self) -> str:
        return f'keep={self.keep!r}'
