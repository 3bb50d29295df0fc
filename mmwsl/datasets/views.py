"""Views (augmented images) that depend on the seed, the epoch and the image alone.

mmengine seeds each worker once from a fixed number: workers that are made anew repeat their augmentations each epoch,
and a resumed run draws others than an unbroken one. Here the sampler hands out *views*, an index with the epoch and the
seed, and the dataset draws from them, so neither workers nor restarts matter.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.data import get_worker_info

from mmwsl.cache import CacheError, TeacherCache, TeacherRecord
from mmwsl.cache.fingerprint import data_fingerprint
from mmwsl.datasets.wrapper import DatasetWrapper
from mmwsl.registry import DATA_SAMPLERS, DATASETS
from mmwsl.utils.data import unwrapped

_VERIFIED = 8  # views that each process draws twice: a transform that acts by chance may come out alike
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


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
        _check_takes_views(self, dataset)
        super().__init__(dataset, *args, **kwargs)
        self.skipped = 0

    def __iter__(self) -> Iterator[View]:  # type: ignore[override]
        return (View(index, self.epoch, self.seed) for index in islice(super().__iter__(), self.skipped, None))

    def skip(self, num_samples: int) -> None:
        """Let this process begin each epoch after so many of its views, until another number is given."""
        self.skipped = num_samples


@DATA_SAMPLERS.register_module()
class InfiniteViewSampler(InfiniteSampler):
    """mmengine's InfiniteSampler for runs by iterations, yielding a :class:`View` for each index.

    All processes share one endless stream, in which epoch e is the images in an order of (seed, e): what
    :class:`ViewSampler` yields in one process, epoch after epoch. Any position follows from the seed, so
    ``mmwsl.EpochSeedHook`` lets a resumed run begin at its own, and no batch is loaded to get there.

    Raises:
        TypeError: If the dataset takes no views, as mmengine's own wrappers around a :class:`SeededViews`.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        _check_takes_views(self, dataset)
        super().__init__(dataset, *args, **kwargs)
        self.skipped = 0

    def __iter__(self) -> Iterator[View]:  # type: ignore[override]
        position = self.rank + self.skipped * self.world_size
        for epoch in count(position // self.size):
            order = self._order(epoch)
            while position < (epoch + 1) * self.size:
                yield View(order[position % self.size], epoch, self.seed)
                position += self.world_size

    def skip(self, num_samples: int) -> None:
        """Let this process begin after so many of its views, counted from the stream's start."""
        self.skipped = num_samples

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()


def _check_takes_views(sampler: Any, dataset: Any) -> None:
    if not getattr(dataset, 'takes_views', False):
        name = type(dataset).__name__
        raise TypeError(
            f'mmwsl.{type(sampler).__name__} asks for views, and {name} does not know them. Make '
            "mmwsl.SeededViews the outermost: dataset=dict(type='mmwsl.SeededViews', "
            f'dataset=dict(type={name!r}, ...))'
        )


@DATASETS.register_module()
class SeededViews(DatasetWrapper):
    """A dataset whose pipeline draws from the view it is asked for.

    Python's, numpy's and torch's generators are seeded for each view, and so are generators that a transform keeps as
    an attribute. Whether that is all is looked at: the first views are drawn twice.

    Args:
        dataset: Config of the dataset, or the dataset. Asked for a plain index, it answers as without this wrapper.

    Raises:
        ValueError: When it is asked: if a view comes out otherwise when it is drawn again. The transform is named.
    """

    takes_views = True

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self._own_generators = [
            generator
            for part in unwrapped(self.dataset)
            for generator in own_generators(getattr(part, 'pipeline', None))
        ]
        self._to_verify = _VERIFIED

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, view: View | int) -> Any:
        if not isinstance(view, View):
            return self.dataset[view]
        results = self._drawn(view, lambda: self.dataset[view.image])
        if self._to_verify:
            self._to_verify -= 1
            if not same(results, self._drawn(view, lambda: self.dataset[view.image])):
                raise ValueError(
                    f'{self._culprit(view)} gives another image when the same view is drawn again, so a '
                    'resumed run or a teacher cache would see other images than it should: let it draw '
                    "from Python's, numpy's or torch's generator, or keep a generator of its own as an "
                    'attribute'
                )
        return results

    @property
    def get_data_info(self) -> Callable[[View | int], dict]:
        """What the dataset has under this name, if it has it; mmdet groups images of one shape by it."""
        told = self.dataset.get_data_info
        return lambda view: told(view.image if isinstance(view, View) else view)

    def _drawn(self, view: View, draw: Callable[[], Any]) -> Any:
        with seeded_generators(view.seed, view.epoch, view.image):
            for place, generator in enumerate(self._own_generators):
                reseed(generator, (view.seed, view.epoch, view.image, place))
            return draw()

    def _culprit(self, view: View) -> str:
        """The first transform whose results differ."""
        results: Any = getattr(self.dataset, 'get_data_info', lambda index: {})(view.image)
        for transform in getattr(getattr(self.dataset, 'pipeline', None), 'transforms', ()):

            def draw(transform: Any = transform, results: Any = results) -> Any:
                return transform(copy.deepcopy(results))

            first, second = self._drawn(view, draw), self._drawn(view, draw)
            if not same(first, second):
                return f'the transform {type(transform).__name__}'
            results = first
        return f'the dataset {type(self.dataset).__name__}'


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
            raise ValueError(
                "CachedViews puts a teacher's record into a DataSample, and the pipeline packs none: end "
                "it with dict(type='PackInputs')"
            )
        sample, record = results['data_samples'], self.cache.read(view.epoch, view.image)
        self._check_image(view, sample, record)
        sample.teacher_record = record
        return results

    def _check_image(self, view: View, sample: Any, record: TeacherRecord) -> None:
        """Raise CacheError where a record is of another image: mmengine draws one where a pipeline returns None."""
        asked, got = self.dataset.get_data_info(view.image).get('sample_idx'), sample.get('sample_idx')
        if got is not None and asked is not None and got != asked:
            raise CacheError(
                f'the pipeline returned nothing for image {asked}, and image {got} came in its place: the '
                'record is not of that one. Take out what drops images, or the files that cannot be read'
            )
        label, recorded = sample.get('gt_label'), self.cache.manifest.record.label(record.data)
        if label is not None and label.numel() == 1 and int(label) != recorded:
            raise CacheError(
                f'image {asked} is of class {int(label)} here and of class {recorded} in the teacher '
                'cache: labels have changed since. Make another cache (tools/cache_teacher.py)'
            )


def own_generators(pipeline: Any) -> Iterator[Any]:
    """Generators that transforms keep as attributes, in their order."""
    for transform in getattr(pipeline, 'transforms', None) or ():
        yield from (value for value in getattr(transform, '__dict__', {}).values() if isinstance(value, _GENERATORS))
        yield from own_generators(transform)


def reseed(generator: Any, key: Sequence[int]) -> None:
    """Seed a generator of Python, numpy or torch from a key of non-negative integers."""
    seeds = np.random.SeedSequence(key)
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seeds).state
        return
    word = int(seeds.generate_state(1)[0])
    (generator.manual_seed if isinstance(generator, torch.Generator) else generator.seed)(word)


def same(first: Any, second: Any) -> bool:
    """Whether what a pipeline returned is the same, to the bit."""
    if isinstance(first, Tensor | np.ndarray):
        return type(first) is type(second) and bool(np.array_equal(np.asarray(first), np.asarray(second)))
    if isinstance(first, BaseDataElement):
        first, second = dict(first.all_items()), dict(second.all_items())
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if type(first) is type(second) and type(first).__eq__ is object.__eq__ and hasattr(first, '__dict__'):
        return same(vars(first), vars(second))  # as mmdet's boxes and masks
    return bool(first == second) or first is second


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
