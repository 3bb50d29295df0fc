import copy
import pickle

import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from mmwsl.utils.data import collate_for, number_images, set_dataloader_defaults, unwrapped


class Numbers(BaseDataset):
    """Items are their own data: a number, and what mmengine adds."""

    def __init__(self, numbers, **kwargs):
        self.numbers = numbers
        super().__init__(**kwargs)

    def load_data_list(self):
        return [dict(number=number) for number in self.numbers]


def joined(*parts):
    return DATASETS.build(dict(type='ConcatDataset', datasets=list(parts)))


def part(numbers, wrapper=None, **kwargs):
    config = dict(type=Numbers, numbers=numbers, **kwargs)
    return (
        dict(type=wrapper, dataset=config, **({'times': 2} if wrapper == 'RepeatDataset' else {}))
        if wrapper
        else config
    )


def ids(dataset):
    return [(dataset[i]['number'], dataset[i]['sample_idx']) for i in range(len(dataset))]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')


def test_images_of_joined_datasets_are_numbered_through():
    nested = joined(part([5, 6]), dict(type='ConcatDataset', datasets=[part([7]), part([8, 9])]))
    assert ids(nested) == [(5, 0), (6, 1), (7, 0), (8, 0), (9, 1)]
    for _ in range(2):  # it may be called again
        number_images(nested)
        assert ids(nested) == [(5, 0), (6, 1), (7, 2), (8, 3), (9, 4)]
    assert [dataset.numbers for dataset in unwrapped(nested)] == [[5, 6], [7], [8, 9]]
    assert nested.get_data_info(3)['sample_idx'] == 3


def test_an_image_that_comes_twice_keeps_its_number():
    dataset = joined(part([5, 6], 'RepeatDataset'), part([7, 8, 9], indices=[2, 0]), part([10, 11]))
    number_images(dataset)
    assert ids(dataset) == [(5, 0), (6, 1), (5, 0), (6, 1), (9, 2), (7, 3), (10, 4), (11, 5)]


@pytest.mark.parametrize('wrapper', ['mmwsl.SeededViews', 'mmwsl.BootstrapDataset'])
def test_our_wrappers_number_what_they_wrap(wrapper):
    inner = dict(type='ConcatDataset', datasets=[part([5, 6]), part([7, 8])])
    dataset = DATASETS.build(
        dict(type=wrapper, dataset=inner, **({'seed': 0} if wrapper == 'mmwsl.BootstrapDataset' else {}))
    )
    assert {number - index for number, index in ids(dataset)} == {5}


def test_one_dataset_stays_as_it_is():
    dataset = DATASETS.build(part([5, 6]))
    number_images(dataset)
    assert 'get_data_info' not in vars(dataset) and ids(dataset) == [(5, 0), (6, 1)]


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_copies_are_numbered_too(copied):
    dataset = joined(part([5, 6]), part([7, 8]))
    number_images(dataset)
    twin = copied(dataset)
    assert ids(twin) == [(5, 0), (6, 1), (7, 2), (8, 3)]
    assert twin.datasets[1].get_data_info.args[0] is twin.datasets[1]
    np.testing.assert_array_equal(twin.datasets[1].get_subset([1]).get_data_info(0)['number'], 8)


@pytest.mark.parametrize(
    'config, collate',
    [
        (dict(data_preprocessor=dict(type='ClsDataPreprocessor')), 'default_collate'),
        (dict(data_preprocessor=dict(mean=[0], std=[1])), 'default_collate'),  # mmpretrain's, by default
        (dict(data_preprocessor=dict(type='SegDataPreProcessor')), 'pseudo_collate'),
        (dict(model=dict(data_preprocessor=dict(type='mmdet.DetDataPreprocessor'))), 'pseudo_collate'),
        (dict(model=dict(architecture=dict(data_preprocessor=dict(type='mmdet.BatchFixedSizePad')))), 'pseudo_collate'),
    ],
    ids=str,
)
def test_who_stacks_images_says_the_data_preprocessor(config, collate):
    config = Config(config)
    assert collate_for(config) == collate
    loader = ConfigDict(collate_fn=dict(type='own'))
    set_dataloader_defaults(loader, False, collate)
    assert loader.collate_fn.type == 'own'
