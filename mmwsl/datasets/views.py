"""Views (augmented images) that depend only on the seed, the epoch and the image.

mmengine seeds each worker once from a fixed number: workers that are started for each epoch repeat their augmentations,
and a resumed run draws others than an uninterrupted one. Here the sampler yields *views*, an index with the epoch and
the seed, and the dataset draws from them, so neither workers nor restarts matter.
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

from mmwsl.cache import CachedAnswer, CacheError, TeacherCache
from mmwsl.cache.fingerprint import data_fingerprint
from mmwsl.datasets.wrapper import DatasetWrapper
from mmwsl.registry import DATA_SAMPLERS, DATASETS
from mmwsl.utils.data import unwrapped

_VERIFIED = 8  # views that each process draws twice: one view may come out the same by chance
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class View(NamedTuple):
    """Key of one augmented version of an image."""

    image: int
    epoch: int
    seed: int


@DATA_SAMPLERS.register_module()
class ViewSampler(DefaultSampler):
    """mmengine's DefaultSampler, which yields a :class:`View` for each index.

    Raises:
        TypeError: If the dataset takes no views, such as mmengine's own wrappers around a :class:`SeededViews`.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        _check_takes_views(self, dataset)
        super().__init__(dataset, *args, **kwargs)
        self.skipped = 0

    def __iter__(self) -> Iterator[View]:  # type: ignore[override]
        return (View(index, self.epoch, self.seed) for index in islice(super().__iter__(), self.skipped, None))

    def skip(self, num_samples: int) -> None:
        """Skip this many of the process's views at the start of each epoch, until another number is set."""
        self.skipped = num_samples


@DATA_SAMPLERS.register_module()
class InfiniteViewSampler(InfiniteSampler):
    """mmengine's InfiniteSampler for runs by iterations, which yields a :class:`View` for each index.

    All processes share one endless stream. Its epoch e is a permutation of the images drawn from (seed, e), which is
    what :class:`ViewSampler` yields in one process, epoch after epoch. Any position follows from the seed, so
    ``mmwsl.EpochSeedHook`` can start a resumed run at its position without loading the batches before it.

    Raises:
        TypeError: If the dataset takes no views, such as mmengine's own wrappers around a :class:`SeededViews`.
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
        """Skip this many of the process's views, counted from the start of the stream."""
        self.skipped = num_samples

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()


def _check_takes_views(sampler: Any, dataset: Any) -> None:
    if not getattr(dataset, 'takes_views', False):
        name = type(dataset).__name__
        raise TypeError(
            f'mmwsl.{type(sampler).__name__} asks for views, and {name} takes only indices. Make '
            "mmwsl.SeededViews the outermost dataset: dataset=dict(type='mmwsl.SeededViews', "
            f'dataset=dict(type={name!r}, ...))'
        )


@DATASETS.register_module()
class SeededViews(DatasetWrapper):
    """A dataset whose pipeline is seeded by the requested view.

    Python's, numpy's and torch's generators are seeded for each view, and so are generators that a transform keeps as
    an attribute. The first views are drawn twice, to verify that this suffices.

    Args:
        dataset: Config of the dataset, or the dataset. A plain index returns the same as without this wrapper.

    Raises:
        ValueError: On access, if a view differs when it is drawn again; the message names the transform.
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
                    f'{self._culprit(view)} returns a different image when the same view is drawn again, so a '
                    'resumed run or a teacher cache would see the wrong images: let it draw from '
                    "Python's, numpy's or torch's generator, or from a generator that it keeps as an attribute"
                )
        return results

    @property
    def get_data_info(self) -> Callable[[View | int], dict]:
        """The dataset's method of this name, if it has one; mmdet uses it to group images of one shape."""
        get_data_info = self.dataset.get_data_info
        return lambda view: get_data_info(view.image if isinstance(view, View) else view)

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
    """A dataset that replays a teacher cache, views and answers: in epoch e, the cache's view e mod V of each image.

    The answer is stored in the field ``teacher_answer`` of the ``DataSample``, for a model with the same
    ``teacher_cache``.

    Args:
        dataset: Config of the dataset.
        cache: Folder of the cache.

    Raises:
        CacheError: If the cache is missing, unfinished, damaged, or of another dataset or pipeline; the message names
            the fields that differ.
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
                "CachedViews puts a teacher's answer into a DataSample, and the pipeline packs none: end "
                "it with dict(type='PackInputs')"
            )
        sample, answer = results['data_samples'], self.cache.read(view.epoch, view.image)
        self._check_image(view, sample, answer)
        sample.teacher_answer = answer
        return results

    def _check_image(self, view: View, sample: Any, answer: CachedAnswer) -> None:
        """Raise CacheError if an answer is for another image: mmengine draws one when a pipeline returns None."""
        asked, got = self.dataset.get_data_info(view.image).get('sample_idx'), sample.get('sample_idx')
        if got is not None and asked is not None and got != asked:
            raise CacheError(
                f'the pipeline returned nothing for image {asked}, and mmengine replaced it by image {got}: the '
                "teacher's answer does not belong to that one. Remove the transform that drops images, or the files "
                'that cannot be read'
            )
        label, cached = sample.get('gt_label'), self.cache.manifest.answer_format.label(answer.data)
        if label is not None and label.numel() == 1 and int(label) != cached:
            raise CacheError(
                f'image {asked} has class {int(label)} here and class {cached} in the teacher '
                'cache: the labels have changed. Make another cache (tools/cache_teacher.py)'
            )


def own_generators(pipeline: Any) -> Iterator[Any]:
    """Yield the generators that transforms keep as attributes, in their order."""
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
    """Whether two results of a pipeline are equal, bit for bit."""
    if isinstance(first, Tensor | np.ndarray):
        return type(first) is type(second) and bool(np.array_equal(np.asarray(first), np.asarray(second)))
    if isinstance(first, BaseDataElement):
        first, second = dict(first.all_items()), dict(second.all_items())
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if type(first) is type(second) and type(first).__eq__ is object.__eq__ and hasattr(first, '__dict__'):
        return same(vars(first), vars(second))  # such as mmdet's boxes and masks
    return bool(first == second) or first is second


@contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators from a key of non-negative integers; restore them afterwards.

    In a worker of a DataLoader nothing else draws from them, so they are not restored, which would take most of the
    time.
    """
    in_worker = get_worker_info() is not None
    states = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
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
