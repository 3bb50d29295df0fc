"""Views (augmented images) that depend on the seed, the epoch and the image alone.

mmengine seeds each worker once from a fixed number: workers that are made anew repeat their augmentations each epoch,
and a resumed run draws others than an unbroken one. Here the sampler hands out *views*, an index with the epoch and the
seed, and the dataset draws from them, so neither workers nor restarts matter.
"""
from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from torch.utils.data import get_worker_info

from mmwsl.cache import TeacherCache
from mmwsl.cache.fingerprint import data_fingerprint
from mmwsl.datasets.wrapper import DatasetWrapper
from mmwsl.registry import DATA_SAMPLERS, DATASETS


class View(NamedTuple):
    """One augmented look at one image."""
    image: int
    epoch: int
    seed: int


@DATA_SAMPLERS.register_module()
class ViewSampler(DefaultSampler):
    """mmengine's DefaultSampler, yielding a :class:`View` for each index.

    Raises:
        TypeError: If the dataset takes no views, as mmengine's own wrappers around a :class:`SeededViews`.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(dataset, 'takes_views', False):
            name = type(dataset).__name__
            raise TypeError(f'mmwsl.ViewSampler asks for views, and {name} does not know them. Make mmwsl.SeededViews '
                            f"the outermost: dataset=dict(type='mmwsl.SeededViews', dataset=dict(type={name!r}, ...))")
        super().__init__(dataset, *args, **kwargs)

    def __iter__(self) -> Iterator[View]:  # type: ignore[override]
        return (View(index, self.epoch, self.seed) for index in super().__iter__())


@DATASETS.register_module()
class SeededViews(DatasetWrapper):
    """A dataset whose pipeline draws from the view it is asked for.

    Args:
        dataset: Config of the dataset, or the dataset. Asked for a plain index, it answers as without this wrapper.
    """
    takes_views = True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, view: View | int) -> Any:
        if not isinstance(view, View):
            return self.dataset[view]
        with seeded_generators(view.seed, view.epoch, view.image):
            return self.dataset[view.image]


@DATASETS.register_module()
class CachedViews(SeededViews):
    """The views of a teacher cache, each with its record: in epoch e, the cache's view e mod V of each image.

    The record is the field ``teacher_record`` of the ``DataSample``, for a model with the same ``teacher_cache``.

    Args:
        dataset: Config of the dataset.
        cache: Folder of the cache.

    Raises:
        CacheError: If the cache is missing, unfinished, damaged, or of another dataset or pipeline; the fields that
            differ are named.
        ValueError: If the pipeline mixes images, or packs no DataSample.
    """

    def __init__(self, dataset: dict, cache: str) -> None:
        super().__init__(dataset)
        self.cache = TeacherCache(cache)
        self.cache.check('data', data_fingerprint(dataset, self.dataset))

    def __getitem__(self, view: View | int) -> Any:
        if not isinstance(view, View):
            return super().__getitem__(view)
        manifest = self.cache.manifest
        view = View(view.image, view.epoch % manifest.views, manifest.seed)
        results = super().__getitem__(view)
        if 'data_samples' not in results:
            raise ValueError("CachedViews puts a teacher's record into a DataSample, and the pipeline packs none: end "
                             "it with dict(type='PackInputs')")
        results['data_samples'].teacher_record = self.cache.read(view.epoch, view.image)
        return results


@contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators from a key of non-negative integers; restore them after.

    In a worker of a DataLoader nobody else draws from them, and they are not restored: that takes most of the time.
    """
    nobody_else = get_worker_info() is not None
    states = None if nobody_else else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
