"""A dataset of small images on the device, which crops and flips whole batches there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from mmwsl.datasets.views import View, same
from mmwsl.registry import DATASETS, FUNCTIONS
from mmwsl.utils.data import number_images, to_device
from mmwsl.utils.old_names import keep_registered

_VERIFIED = 8  # images that are read twice, to find random transforms: one image may come out the same by chance


@DATASETS.register_module()
class DeviceDataset:
    """A dataset of small images in one tensor on the device, so that no step waits for a worker or a copy.

    Each process holds all images, C * H * W bytes each: CIFAR's 50,000 take 154 MB on the device, and as much again in
    the host's memory, in the wrapped dataset. A view is a function of its seed, epoch and image, as with
    :class:`SeededViews`; its numbers are drawn differently, but from the same distribution. The dataloader needs
    ``num_workers=0``, ``pin_memory=False`` and ``collate_fn=dict(type='mmwsl.identity_collate')``.

    Args:
        dataset: Config of a dataset of mmpretrain with one label for each image, or the dataset. Its pipeline runs only
            once for each image and ends in PackInputs, so nothing in it may be random.
        padding: Pixels of zero padding on each side of an image, from which a random crop of its size is taken.
        flip_prob: Probability of a horizontal flip.
        device: Device of the images. None: the one on which mmengine puts the model.

    Raises:
        ValueError: If images differ in size, the pipeline is random, or flip_prob is not in [0, 1]. On access, if views
            are random and the sampler is not ``mmwsl.ViewSampler``.
        RuntimeError: If it is read in a worker.
    """

    takes_views = True

    def __init__(self, dataset: Any, padding: int = 0, flip_prob: float = 0.0, device: str | None = None) -> None:
        if padding < 0 or not 0 <= flip_prob <= 1:
            raise ValueError(
                'padding should be at least 0 and flip_prob a probability, got '
                f'padding={padding} and flip_prob={flip_prob}'
            )
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        number_images(dataset)
        self.padding, self.flip_prob = padding, flip_prob
        self.dataset = dataset  # mmwsl.cache.fingerprint.training_set reads it
        self.metainfo = dataset.metainfo
        images, labels, self.sample_idx = _read(dataset)
        self.images, self.labels = (tensor.to(device or get_device()) for tensor in (images, labels))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, view: View | int) -> dict:
        """Return one image, (C, H, W), with its DataSample."""
        return {name: values[0] for name, values in self.__getitems__([view]).items()}

    def __getitems__(self, views: Sequence[View | int]) -> dict:
        """Return the batch that a DataLoader requests: uint8 images of shape (N, C, H, W), and N DataSamples."""
        if get_worker_info() is not None:
            raise RuntimeError(
                'a DeviceDataset can only be read by the training process: set num_workers=0 and '
                'persistent_workers=False in its dataloader'
            )
        chosen = [view.image if isinstance(view, View) else int(view) for view in views]
        index = to_device(torch.tensor(chosen), self.images.device)
        images = self.images[index]
        if self.padding or self.flip_prob:
            images = crop_and_flip(images, self.padding, *draw(_as_views(views), self.padding, self.flip_prob))
        labels = self.labels[index].split(1)
        samples = [
            DataSample(gt_label=label, metainfo=dict(sample_idx=self.sample_idx[image]))
            for label, image in zip(labels, chosen, strict=True)
        ]
        return dict(inputs=images, data_samples=samples)


@FUNCTIONS.register_module()
def identity_collate(batch: dict) -> dict:
    """Return a batch as it is: a DeviceDataset has already made it."""
    return batch


keep_registered(FUNCTIONS, 'already_collated', identity_collate)


def crop_and_flip(images: Tensor, padding: int, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> Tensor:
    """Pad images with zeros, crop each to its original size at (top, left), and flip some.

    Args:
        images: Shape: (N, C, H, W).
        padding: In pixels, on each side.
        top, left: Corner of the crop in the padded image, in [0, 2 * padding]. Shape: (N, ).
        flip: Whether the crop is flipped horizontally. Shape: (N, ).

    Returns:
        Shape: as images.
    """
    return crop_at(images, padding, to_device(torch.from_numpy(np.stack((top, left, flip))), images.device))


def crop_at(images: Tensor, padding: int, corner: Tensor) -> Tensor:
    """Do the same as :func:`crop_and_flip`, with its three arrays as rows of one tensor on the device.

    Args:
        images: Shape: (N, C, H, W).
        padding: In pixels, on each side.
        corner: Top, left and whether to flip, int64. Shape: (3, N).

    Returns:
        Shape: as images.
    """
    height, width = images.shape[2:]
    rows = corner[0, :, None] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = corner[1, :, None] + torch.where(corner[2, :, None] > 0, across.flip(0), across)
    index = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).view(len(images), 1, -1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)


def draw(views: Sequence[View], padding: int, flip_prob: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the augmentation of each view: top and left of the crop, uniform in [0, 2 * padding], and whether to flip.
    Shape: (N, ) each."""
    words = np.zeros(len(views), dtype=np.uint64)
    for key in np.array(views, dtype=np.uint64).T:  # image, epoch, seed
        words = _splitmix64(words ^ key)
    places = np.uint64(2 * padding + 1)
    top, left = words % places, words // places % places
    uniform = (_splitmix64(words) >> np.uint64(11)) * 2.0**-53
    return top.astype(np.int64), left.astype(np.int64), uniform < flip_prob


def _splitmix64(words: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit words (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _as_views(views: Sequence[View | int]) -> Sequence[View]:
    if not all(isinstance(view, View) for view in views):
        raise ValueError(
            'random views need the epoch and the seed, and the sampler yields plain indices: set '
            "sampler=dict(type='mmwsl.ViewSampler', shuffle=True) in the dataloader"
        )
    return views  # type: ignore[return-value]


def _read(dataset: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Read all images, uint8 (N, C, H, W), and labels, int64 (N, ), to the CPU, with their indices in the dataset."""
    labels = torch.empty(len(dataset), dtype=torch.int64)
    images, sample_idx, before = torch.empty(0), [], _generators()
    for i in range(len(dataset)):
        item = dataset[i]
        if i == 0:
            images = torch.empty(len(dataset), *item['inputs'].shape, dtype=item['inputs'].dtype)
        if item['inputs'].shape != images.shape[1:]:
            name = item['data_samples'].get('img_path') or f'image {i}'
            raise ValueError(
                f'the images of a DeviceDataset should have one size, got {tuple(images.shape[1:])} and, for '
                f"{name}, {tuple(item['inputs'].shape)}: resize them in the dataset's pipeline, with "
                "dict(type='Resize', scale=(WIDTH, HEIGHT))"
            )
        if (i == 0 and _generators() != before) or (i < _VERIFIED and not same(item, dataset[i])):
            raise ValueError(
                "the pipeline of a DeviceDataset's dataset runs only once for each image, and this one draws random "
                'numbers. Remove its random transforms, and use padding and flip_prob of the DeviceDataset to crop '
                f'and flip: {getattr(dataset, "pipeline", "")}'
            )
        images[i], labels[i] = item['inputs'], item['data_samples'].gt_label.item()
        sample_idx.append(item['data_samples'].get('sample_idx', i))  # in a resample, sample_idx is not the position
    return images, labels, sample_idx


def _generators() -> tuple:
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().tolist()  # type: ignore[index]
