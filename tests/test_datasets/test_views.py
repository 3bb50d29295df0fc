import copy
import pickle
import random
from itertools import islice

import numpy as np
import pytest
import torch
from mmengine.dataset import sampler as mmengine_sampler
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import DataLoader

from mmwsl.datasets.views import InfiniteViewSampler, SeededViews, View, ViewSampler, seeded_generators


class Draws:
    """Items are an index and a number from each generator that a pipeline may draw from."""

    metainfo = dict(classes=('a', 'b'))

    def __init__(self, length=8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return (index, *draw())


class Broken(Draws):
    def __getitem__(self, index):
        draw()
        raise OSError('the file is not there')


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def states():
    name, words, *rest = np.random.get_state()
    return random.getstate(), (name, words.tolist(), *rest), torch.get_rng_state().tolist()


def epochs_of_draws(num_workers, persistent_workers=False, seed=3):
    """All items of two epochs, in the sampler's order."""
    dataset = SeededViews(Draws())
    sampler = ViewSampler(dataset, shuffle=True, seed=seed)
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=list,
        persistent_workers=persistent_workers,
    )
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([item for batch in loader for item in batch])
    return epochs


@pytest.mark.parametrize('num_workers, persistent', [(1, False), (2, False), (2, True)])
def test_draws_do_not_depend_on_workers(num_workers, persistent):
    first, second = epochs_of_draws(0)
    assert epochs_of_draws(num_workers, persistent) == [first, second]
    assert not {item[1:] for item in first} & {item[1:] for item in second}


def test_draws_repeat_and_follow_the_seed():
    assert epochs_of_draws(0, seed=3) == epochs_of_draws(0, seed=3)
    assert epochs_of_draws(0, seed=3) != epochs_of_draws(0, seed=4)


@pytest.mark.parametrize(
    'other',
    [View(2, 1, 0), View(1, 3, 0), View(1, 2, 1), View(0, 2, 1)],
    ids=['index and epoch swapped', 'epoch', 'seed', 'index and seed swapped'],
)
def test_another_view_draws_other_numbers_from_each_generator(other):
    dataset = SeededViews(Draws())
    for a, b in zip(dataset[View(1, 2, 0)][1:], dataset[other][1:]):
        assert a != b


def test_what_was_drawn_before_does_not_matter():
    dataset = SeededViews(Draws())
    wanted = dataset[View(5, 1, 2)]
    for _ in range(3):
        draw()
    dataset[View(4, 1, 2)]
    assert dataset[View(5, 1, 2)] == wanted


def test_each_index_gets_a_view_of_its_own():
    dataset = SeededViews(Draws(400))
    items = np.array([dataset[view][1:] for view in ViewSampler(dataset, shuffle=False, seed=0)])
    for numbers in items.T:
        assert len(set(numbers)) == 400
        assert 0.45 < numbers.mean() < 0.55  # of a uniform distribution: 0.5, standard deviation 0.014
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.15  # standard deviation 0.05


def test_the_callers_generators_are_untouched():
    before = states()
    SeededViews(Draws())[View(0, 0, 0)]
    assert states() == before


def test_the_callers_generators_are_untouched_when_the_pipeline_raises():
    before = states()
    with pytest.raises(OSError, match='not there'):
        SeededViews(Broken())[View(1, 0, 0)]
    assert states() == before


def test_views_inside_each_other_do_not_mix():
    with seeded_generators(1):
        wanted = draw(), draw()
    with seeded_generators(1):
        first = draw()
        with seeded_generators(2):
            draw()
        assert (first, draw()) == wanted


@pytest.mark.parametrize('index', [3, -1, np.int64(3)])
def test_a_plain_index_passes_through(index):
    dataset = SeededViews(Draws())
    with seeded_generators(7):
        wanted = Draws()[index]
    with seeded_generators(7):
        assert dataset[index] == wanted
        assert dataset[index] != wanted  # the caller's generators moved on


def test_answers_as_the_dataset_does():
    dataset = SeededViews(Draws(5))
    assert len(dataset) == 5
    assert dataset.metainfo == dict(classes=('a', 'b'))
    assert not hasattr(dataset, 'no_such_thing')


@pytest.mark.parametrize(
    'copied',
    [copy.copy, copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))],
    ids=['copy', 'deepcopy', 'pickle'],
)
def test_copies_work(copied):
    dataset = SeededViews(Draws(5))
    twin = copied(dataset)
    assert type(twin) is SeededViews
    assert twin.metainfo == dataset.metainfo
    assert twin[View(2, 1, 0)] == dataset[View(2, 1, 0)]


def test_builds_from_a_config():
    dataset = DATASETS.build(dict(type='mmwsl.SeededViews', dataset=dict(type='mmwsl.Digits', split='train')))
    sampler = DATA_SAMPLERS.build(dict(type='mmwsl.ViewSampler', dataset=dataset, shuffle=True, seed=1))
    assert type(dataset) is SeededViews
    assert dataset.metainfo['classes'] == tuple('0123456789')
    assert len(dataset) == len(sampler) == 600


def test_a_dataset_that_fetches_whole_batches():
    dataset = SeededViews(torch.utils.data.Subset(Draws(), range(4)))
    loader = DataLoader(dataset, batch_size=2, sampler=ViewSampler(dataset, shuffle=False, seed=0), collate_fn=list)
    assert [item for batch in loader for item in batch] == [SeededViews(Draws())[View(i, 0, 0)] for i in range(4)]


@pytest.mark.parametrize(
    'wrapper', [dict(type='RepeatDataset', times=2), dict(type='ClassBalancedDataset', oversample_thr=0.2)]
)
def test_mmengines_wrappers_work_inside_and_are_explained_outside(wrapper):
    inner = dict(type='mmwsl.Digits', split='train')
    inside = DATASETS.build(dict(type='mmwsl.SeededViews', dataset=dict(wrapper, dataset=inner)))
    assert inside[next(iter(ViewSampler(inside)))]['gt_label'] in range(10)
    outside = DATASETS.build(dict(wrapper, dataset=dict(type='mmwsl.SeededViews', dataset=inner)))
    with pytest.raises(TypeError, match=rf'{wrapper["type"]} takes only indices\. Make mmwsl\.SeededViews the outer'):
        ViewSampler(outside)


def views_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_sampler_covers_every_index_once_and_carries_epoch_and_seed():
    sampler = ViewSampler(SeededViews(Draws(50)), shuffle=True, seed=4)
    orders = []
    for epoch in (0, 1):
        views = views_of(sampler, epoch)
        assert all(type(view) is View for view in views)
        assert sorted(views) == [View(index, epoch, 4) for index in range(50)]
        orders.append([view.image for view in views])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_the_sampler_repeats_an_epoch():
    sampler = ViewSampler(SeededViews(Draws(50)), shuffle=True, seed=4)
    wanted = views_of(sampler, 3)
    views_of(sampler, 4)
    other = ViewSampler(SeededViews(Draws(50)), shuffle=True, seed=4)
    assert views_of(sampler, 3) == wanted == views_of(other, 3)


def test_the_sampler_without_shuffling():
    views = [View(0, 0, 4), View(1, 0, 4), View(2, 0, 4)]
    assert list(ViewSampler(SeededViews(Draws(3)), shuffle=False, seed=4)) == views


def test_a_seed_set_later_counts():
    sampler = ViewSampler(SeededViews(Draws(3)), shuffle=False, seed=4)
    sampler.seed = 5
    assert {view.seed for view in sampler} == {5}


def test_processes_share_out_the_same_views(monkeypatch):
    alone = list(ViewSampler(SeededViews(Draws(8)), shuffle=True, seed=4))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(mmengine_sampler, 'get_dist_info', lambda rank=rank: (rank, 2))
        shares.append(list(ViewSampler(SeededViews(Draws(8)), shuffle=True, seed=4)))
    assert shares == [alone[0::2], alone[1::2]]


def stream(length, rank=0, world=1, images=8, monkeypatch=None, **kwargs):
    """The first views of an endless sampler."""
    if monkeypatch:
        monkeypatch.setattr(mmengine_sampler, 'get_dist_info', lambda: (rank, world))
    sampler = InfiniteViewSampler(SeededViews(Draws(images)), seed=4, **kwargs)
    return list(islice(sampler, length))


def test_the_endless_stream_is_epoch_after_epoch():
    sampler = ViewSampler(SeededViews(Draws(8)), shuffle=True, seed=4)
    assert stream(20) == [*views_of(sampler, 0), *views_of(sampler, 1), *views_of(sampler, 2)[:4]]
    assert stream(5, images=3, shuffle=False) == [
        View(0, 0, 4),
        View(1, 0, 4),
        View(2, 0, 4),
        View(0, 1, 4),
        View(1, 1, 4),
    ]


@pytest.mark.parametrize('world', [2, 3, 20])
def test_processes_share_the_endless_stream(monkeypatch, world):
    alone = stream(5 * world)
    for rank in range(world):
        assert stream(5, rank, world, monkeypatch=monkeypatch) == alone[rank::world]


@pytest.mark.parametrize('skipped', [0, 3, 8, 21])
def test_the_endless_stream_begins_where_a_process_stands(monkeypatch, skipped):
    wanted = stream(skipped + 10, 1, 3, monkeypatch=monkeypatch)[skipped:]
    sampler = InfiniteViewSampler(SeededViews(Draws(8)), seed=4)
    sampler.skip(99)
    sampler.skip(skipped)  # from the start, whatever was skipped before
    assert list(islice(sampler, 10)) == wanted


def test_a_plain_dataset_has_no_endless_stream_of_views():
    with pytest.raises(TypeError, match=r'mmwsl\.InfiniteViewSampler asks for views, and Draws .* Make mmwsl\.Seeded'):
        InfiniteViewSampler(Draws(3))


def test_pipeline_put_in_place_from_outside_is_the_datasets():
    inner = Draws()
    inner.pipeline = 'as configured'
    views = SeededViews(inner)
    assert views.pipeline == 'as configured'
    views.pipeline = 'to look at'
    assert inner.pipeline == 'to look at'


class OwnGenerator:
    """A transform that draws from a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, results):
        numpys = isinstance(self.generator, np.random.Generator | np.random.RandomState)
        number = (
            self.generator.random()
            if isinstance(self.generator, random.Random)
            else self.generator.uniform()
            if numpys
            else torch.rand((), generator=self.generator).item()
        )
        return {**results, 'number': number}


class Hidden:
    """A transform whose generator nobody finds."""

    def __init__(self):
        generator = np.random.default_rng()
        self.draw = lambda: generator.random()

    def __call__(self, results):
        return {**results, 'number': self.draw()}


def digits(*transforms):
    return DATASETS.build(dict(type='mmwsl.Digits', pipeline=list(transforms)))


@pytest.mark.parametrize(
    'generator',
    [np.random.default_rng(0), np.random.RandomState(0), random.Random(0), torch.Generator()],
    ids=lambda generator: type(generator).__name__,
)
def test_generator_of_a_transform_follows_the_view(generator):
    dataset = SeededViews(digits(OwnGenerator(generator)))
    first = dataset[View(1, 2, 3)]['number']
    assert first != dataset[View(1, 3, 3)]['number']
    assert first == dataset[View(1, 2, 3)]['number']
    assert first == SeededViews(digits(lambda results: results, OwnGenerator(generator)))[View(1, 2, 3)]['number']


def test_view_that_comes_out_otherwise_when_drawn_again_is_refused_by_name():
    dataset = SeededViews(digits(OwnGenerator(random.Random()), Hidden()))
    with pytest.raises(
        ValueError, match='the transform Hidden returns a different image when the same view is drawn again'
    ):
        dataset[View(1, 2, 3)]


class Boxes:
    """As mmdet's: what it holds can be compared, and it cannot."""

    def __init__(self, numbers):
        self.numbers = numbers


@pytest.mark.parametrize('draw, repeats', [(lambda: 0.5, True), (np.random.default_rng(0).random, False)])
def test_objects_are_compared_by_what_they_hold(draw, repeats):
    dataset = SeededViews(digits(lambda results: {**results, 'boxes': Boxes(torch.full((2, 4), draw()))}))
    if repeats:
        assert dataset[View(1, 2, 3)]['boxes'].numbers[1, 3] == 0.5
    else:
        with pytest.raises(ValueError, match='returns a different image when the same view is drawn again'):
            dataset[View(1, 2, 3)]


def test_views_are_verified_for_a_while_only():
    drawn = []
    dataset = SeededViews(digits(lambda results: drawn.append(0) or results))
    for image in range(20):
        dataset[View(image, 0, 0)]
    assert len(drawn) == 28
