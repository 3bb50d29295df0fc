"""Make batches of images that stay on the device, without the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import DataLoader

from mmwsl.datasets.device import DeviceDataset, crop_at, draw


class Batches:
    """The batches of all runs with one seed: those of ``DeviceDataset`` and ``ViewSampler``, made by kernels.

    Args:
        loader: Dataloader of the training images.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.dataset: DeviceDataset = loader.dataset  # type: ignore[assignment]
        self.sampler: Any = loader.sampler
        images = len(loader.sampler)  # type: ignore[arg-type]
        self.size = loader.batch_size or 1
        whole, rest = divmod(images, self.size)
        self.sizes = [self.size] * whole + ([rest] if rest and not loader.drop_last else [])
        device = self.dataset.images.device
        self.places = torch.tensor(self.dataset.sample_idx, device=device)
        self.views = torch.zeros(4, images, dtype=torch.int64, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)

    def drawn(self, epoch: int) -> Tensor:
        """Return an epoch's images, each with top, left and flip of its crop, on the CPU. Shape: (4, images)."""
        self.sampler.set_epoch(epoch)
        views = list(self.sampler)
        images = np.fromiter((getattr(view, 'image', view) for view in views), np.int64, len(views))
        crops = (
            draw(views, self.dataset.padding, self.dataset.flip_prob)
            if self._is_random()
            else [np.zeros(len(views), np.int64)] * 3
        )
        drawn = torch.from_numpy(np.stack((images, *crops)))
        return drawn.pin_memory() if self.views.is_cuda else drawn

    def begin(self, drawn: Tensor) -> None:
        """Start an epoch at its first batch."""
        self.views.copy_(drawn, non_blocking=True)
        self.position.zero_()

    def next(self, size: int) -> dict:
        """Return the next batch, as a dataloader would, and advance by one."""
        at = self.position + torch.arange(size, device=self.views.device)
        image, *corner = self.views.index_select(1, at)
        inputs = self.dataset.images[image]
        if self._is_random():
            inputs = crop_at(inputs, self.dataset.padding, torch.stack(corner))
        self.position += size
        return dict(inputs=inputs, data_samples=_samples(self.dataset.labels[image], self.places[image]))

    def _is_random(self) -> bool:
        return bool(self.dataset.padding or self.dataset.flip_prob)


def _samples(labels: Tensor, places: Tensor) -> list[DataSample]:
    """Return data samples with each image's label and place in its dataset, on the device."""
    return [
        DataSample(gt_label=label, metainfo=dict(sample_idx=place))
        for label, place in zip(labels.split(1), places.unbind(), strict=True)
    ]
