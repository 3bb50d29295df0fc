import copy
import pickle
import random

import numpy as np
import pytest
from mmengine.registry import DATASETS

from mmwsl.datasets import BootstrapDataset, Digits, Fold, SeededViews
from mmwsl.datasets.views import View

PACKED = dict(type='mmwsl.Digits', split='train', pipeline=[dict(type='mmpretrain.PackInputs')])


class Draws:
    """Items are an index and a random number."""

    metainfo = dict(classes=('a', 'b'))

    def __init__(self, length=1000):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index, random.random()


def images(dataset):
    return [dataset[index][0] for index in range(len(dataset))]


def test_as_many_items_with_repetition():
    drawn = images(BootstrapDataset(Draws(), seed=0))
    assert len(drawn) == 1000 and set(drawn) <= set(range(1000))
    assert 0.60 < len(set(drawn)) / 1000 < 0.66  # 1 - 1/e, standard deviation 0.01


def test_the_seed_decides():
    assert images(BootstrapDataset(Draws(), seed=3)) == images(BootstrapDataset(Draws(), seed=3))
    same = np.mean(np.array(images(BootstrapDataset(Draws(), seed=3))) == images(BootstrapDataset(Draws(), seed=4)))
    assert same < 0.02


def test_an_image_that_was_drawn_twice_is_seen_in_two_views():
    resample = BootstrapDataset(Draws(), seed=0)
    values, counts = np.unique(resample.indices, return_counts=True)
    image = values[counts > 1][0]
    one, two = np.flatnonzero(resample.indices == image)[:2]
    views = SeededViews(resample)
    (a, x), (b, y) = (views[View(int(index), 0, 0)] for index in (one, two))
    assert a == b == image and x != y
    assert views[View(int(one), 0, 0)] == (a, x)


def test_items_keep_the_index_that_they_have_in_the_dataset():
    resample = DATASETS.build(dict(type='mmwsl.BootstrapDataset', seed=1, dataset=PACKED))
    assert type(resample) is BootstrapDataset and len(resample) == 600
    for index in (0, 5, 599):
        assert resample[index]['data_samples'].sample_idx == resample.indices[index]
        assert resample.get_data_info(index)['gt_label'] == resample[index]['data_samples'].gt_label.item()


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_answers_as_the_dataset_does_also_when_copied(copied):
    twin = copied(BootstrapDataset(Draws(), seed=0))
    assert twin.metainfo == dict(classes=('a', 'b'))
    assert not hasattr(twin, 'no_such_thing')
    assert images(twin) == images(BootstrapDataset(Draws(), seed=0))


@pytest.mark.parametrize('selection', [BootstrapDataset, Fold])
@pytest.mark.parametrize('wrapper', ['SeededViews', 'DeviceDataset'])
def test_views_are_not_picked_from(wrapper, selection):
    views = DATASETS.build(dict(type=f'mmwsl.{wrapper}', dataset=PACKED))
    name = selection.__name__
    with pytest.raises(ValueError, match=f'mmwsl.{name} selects images and not views, got a {wrapper}: put it inside'):
        selection(views, seed=0)


def test_of_a_subset_only_the_subset_is_drawn():
    assert set(BootstrapDataset(Digits(indices=10), seed=0).indices) <= set(range(10))


def test_pipeline_put_in_place_reaches_the_dataset():
    resample = BootstrapDataset(DATASETS.build(PACKED), seed=0)
    pipeline = resample.pipeline = lambda item: item['sample_idx']
    assert resample.dataset.pipeline is pipeline
    assert [resample[index] for index in range(5)] == resample.indices[:5].tolist()
