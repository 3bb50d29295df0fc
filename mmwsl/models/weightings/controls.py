"""Control weightings, which show the effect of a weighting by removing a part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmwsl.models.weightings.base import SampleWeighting, build_weighting, inherit
from mmwsl.models.weightings.batch import SampleBatch
from mmwsl.registry import MODELS


@MODELS.register_module()
class UniformWeighting(SampleWeighting):
    """Weight 1 for every target, which leaves the loss unchanged.

    Examples:
        >>> UniformWeighting()(SampleBatch(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 1])))
        tensor([1., 1.])
    """

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return ones. Shape: (N, \*)."""
        return torch.ones_like(batch.kept, dtype=batch.dtype)


@MODELS.register_module()
class MeanWeighting(SampleWeighting):
    """The mean of another weighting over the batch, for every target: its scale without its selection.

    Args:
        of: Config of the other weighting. Default: WSL's.

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
        r"""Return the batch's mean weight for every target. Shape: (N, \*), or (N, C, \*) for weights per class."""
        weight = self.of(batch)
        return batch.mean(weight).expand_as(weight)


@MODELS.register_module()
class ShuffledWeighting(SampleWeighting):
    """The weights of another weighting in random order: their distribution without their selection.

    It draws from its own generator, so that dropout and augmentations draw the same numbers with and without it. The
    generator is seeded again whenever torch is seeded (by ``mmwsl.EpochSeedHook`` at each epoch), so that a resumed run
    repeats an uninterrupted one. In a graph of torch.compile or CUDA, which supports no other, torch's generator is
    used.

    Args:
        of: Config of the other weighting. Default: WSL's.

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
        r"""Return the batch's weights in random order. Shape: (N, \*), or (N, C, \*) for weights per class."""
        weight = self.of(batch)
        return permuted(weight, batch.kept.expand_as(weight), self._drawn_from(weight.device))

    def _drawn_from(self, device: torch.device) -> torch.Generator | None:
        if torch.compiler.is_compiling() or (device.type == 'cuda' and torch.cuda.is_current_stream_capturing()):
            return None
        if device.type == 'meta':  # has no generator
            device = torch.device('cpu')
        if self._generator is None or self._seed != torch.initial_seed() or self._generator.device != device:
            self._seed = torch.initial_seed()
            self._generator = torch.Generator(device).manual_seed(
                (self._seed + 1) % 2**63
            )  # other numbers than torch's
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_generator': None}  # type: ignore[misc]  # cannot be pickled


def permuted(weight: Tensor, kept: Tensor, generator: torch.Generator | None) -> Tensor:
    """Permute the weights of the targets that count; two sorts do it without waiting for the device.

    Args:
        weight: Weights of any shape.
        kept: Mask of the weights to permute. Shape: as weight.
        generator: Generator on the device of weight. None: torch's own.

    Returns:
        Shape: as weight.
    """
    flat, kept = weight.flatten(), kept.flatten()
    keys = torch.rand(flat.shape, generator=generator, device=flat.device)
    order = (keys + ~kept).argsort()  # kept ones first, in random order
    places = (~kept).to(torch.uint8).argsort(stable=True)  # kept ones first, in their own order
    return torch.empty_like(flat).index_copy_(0, places, flat[order]).view_as(weight)


@MODELS.register_module()
class RegularizationWeighting(SampleWeighting):
    r"""Weight 1 either for regularization samples, \|b\| > \|a\|, or for all others; else 0 (arXiv 2102.00650, Sec. 3).

    Args:
        keep: 'regularization' keeps only the regularization samples, 'others' drops them.

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
        r"""Return 1 for the targets to keep, else 0. Shape: (N, \*)."""
        return (batch.is_regularization == (self.keep == 'regularization')).to(batch.dtype)

    def extra_repr(self) -> str:
        return f'keep={self.keep!r}'
