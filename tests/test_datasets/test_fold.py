import copy
import pickle
from itertools import chain

import numpy as np
import pytest
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from mmwsl.datasets import Digits, Fold, SeededViews
from mmwsl.datasets.views import View
from tests.tiny import digits_config, network

PACKED = [dict(type='mmpretrain.PackInputs')]


class Numbers(list):
    """Items are numbers; a list is as good as a dataset."""

    metainfo = dict(classes=('a', 'b'))


def items(**kwargs):
    fold = Fold(Numbers(range(100, 111)), **kwargs)
    return [fold[index] for index in range(len(fold))]


@pytest.mark.parametrize('folds, sizes', [(2, [6, 5]), (4, [3, 3, 3, 2]), (11, [1] * 11)])
def test_each_item_is_in_exactly_one_fold(folds, sizes):
    held_out = [items(fold=fold, folds=folds, held_out=True) for fold in range(folds)]
    assert [len(fold) for fold in held_out] == sizes
    assert sorted(chain(*held_out)) == list(range(100, 111))


@pytest.mark.parametrize('fold', range(3))
def test_all_others_are_trained_on_in_their_order(fold):
    held_out, others = (items(fold=fold, folds=3, seed=4, held_out=held_out) for held_out in (True, False))
    assert not set(held_out) & set(others) and sorted(held_out + others) == list(range(100, 111))
    assert held_out == sorted(held_out) and others == sorted(others)


def test_the_seed_decides():
    assert items(seed=3) == items(seed=3) != items(seed=4)


def test_folds_are_no_runs_of_sorted_images():
    """Files are often sorted by class; the mean gap within a fifth of 1,000 is then 1 and, drawn at random, 5."""
    fold = Fold(Numbers(range(1000)), held_out=True)
    assert 4.5 < np.diff(fold.indices).mean() < 5.5


def test_items_keep_the_index_that_they_have_in_the_dataset():
    fold = DATASETS.build(dict(type='mmwsl.Fold', fold=1, folds=3, dataset=dict(type='mmwsl.Digits', pipeline=PACKED)))
    assert type(fold) is Fold and len(fold) == 400
    for index in (0, 5, 399):
        assert fold[index]['data_samples'].sample_idx == fold.get_data_info(index)['sample_idx'] == fold.indices[index]
        assert fold[index]['data_samples'].gt_label.item() == fold.get_data_info(index)['gt_label']
    view = SeededViews(fold)[View(5, 0, 0)]
    assert view['data_samples'].sample_idx == fold.indices[5]


def test_of_a_subset_only_the_subset_is_divided():
    assert sorted(chain(*(Fold(Digits(indices=10), fold, 5, True).indices for fold in range(5)))) == list(range(10))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_answers_as_the_dataset_does_also_when_copied(copied):
    twin = copied(Fold(Numbers(range(11)), seed=1))
    assert twin.metainfo == dict(classes=('a', 'b'))
    assert twin.indices.tolist() == Fold(Numbers(range(11)), seed=1).indices.tolist()


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(fold=5), r'fold should be in \[0, 5\), counted from 0, got 5'),
        (dict(fold=-1), r'fold should be in \[0, 5\), counted from 0, got -1'),
        (dict(folds=1), 'at least 2 and at most the number of images, 11, got 1'),
        (dict(folds=12), 'at least 2 and at most the number of images, 11, got 12'),
    ],
)
def test_a_fold_that_there_is_not(settings, message):
    with pytest.raises(ValueError, match=message):
        items(**settings)


def test_a_run_trains_on_the_others_alone(tmp_path):
    cfg = digits_config(tmp_path, network(2), custom_hooks=[])
    views = cfg.train_dataloader.dataset
    views.dataset = dict(type='mmwsl.Fold', folds=3, dataset=views.dataset)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 4  # batches of 100: 400 images of 600
