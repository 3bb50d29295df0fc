import copy

import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmwsl.cache.fingerprint import data_fingerprint, differences, refuse_mixing, teacher_fingerprint, weights_hash
from tests.tiny import PREPROCESSOR, build, network, save_teacher


@pytest.fixture
def folder(tmp_path):
    """A function that makes the same small data set in a folder."""

    def make(name):
        for label in ('cat', 'dog'):
            for index in range(2):
                path = tmp_path / name / label / f'{index}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (4, 4), (index, 0, 0)).save(path)
        return tmp_path / name

    return make


def fingerprint_of(root, **kwargs):
    config = dict(
        type='CustomDataset',
        data_root=str(root),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')],
        **kwargs,
    )
    init_default_scope('mmpretrain')
    return data_fingerprint(config, DATASETS.build(copy.deepcopy(config)))


def test_moved_data_are_the_same_data(folder):
    assert fingerprint_of(folder('here')) == fingerprint_of(folder('there'))


def test_other_data_are_others(folder):
    here, there = folder('here'), folder('there')
    (there / 'cat/1.png').rename(there / 'cat/2.png')
    assert [text.split()[0] for text in differences(fingerprint_of(here), fingerprint_of(there))] == ['images']
    (there / 'cat/2.png').rename(there / 'dog/2.png')
    found = differences(fingerprint_of(here), fingerprint_of(there))
    assert [text.split()[0] for text in found] == ['labels', 'images']
    (there / 'dog/2.png').unlink()
    assert differences(fingerprint_of(here), fingerprint_of(there))[0] == 'length is 4 in the cache and 3 here'


def test_images_in_memory_are_compared_byte_by_byte():
    def digits():
        return DATASETS.build(dict(type='mmwsl.Digits', split='train', serialize_data=False))

    dataset, other = digits(), digits()
    assert data_fingerprint({}, dataset) == data_fingerprint({}, other)
    other.data_list[5]['img'] = other.data_list[5]['img'] ^ 1
    found = differences(data_fingerprint({}, dataset), data_fingerprint({}, other))
    assert [text.split()[0] for text in found] == ['images']


def test_differences_are_named_down_to_the_value():
    cached = dict(pipeline=[dict(type='A'), dict(type='B', size=32)], mean=[1, 2], old=3)
    current = dict(pipeline=[dict(type='A'), dict(type='B', size=28)], mean=[1, 2, 3], new=4)
    assert differences(cached, current, 'data') == [
        'data.pipeline.1.size is 32 in the cache and 28 here',
        'data.mean is [1, 2] in the cache and [1, 2, 3] here',
        'data.old is 3 in the cache and None here',
        'data.new is None in the cache and 4 here',
    ]


def test_weights_are_compared_by_name_type_and_value():
    weights = dict(a=torch.ones(2), b=torch.zeros(3, dtype=torch.bfloat16), c=torch.tensor(1))
    same = dict(reversed(weights.items()))
    assert weights_hash(same) == weights_hash(weights)
    assert weights_hash({**weights, 'bn.num_batches_tracked': torch.tensor(5)}) == weights_hash(weights)
    assert weights_hash({**weights, 'a': torch.tensor([1.0, 1 + 2**-23])}) != weights_hash(weights)
    assert weights_hash({**weights, 'a': torch.ones(2, 1)}) != weights_hash(weights)
    assert weights_hash({**weights, 'a': torch.ones(2).view(torch.int32)}) != weights_hash(weights)


def test_a_teachers_file_and_each_of_an_ensemble_are_compared(tmp_path):
    preprocessor = build(network(2, data_preprocessor=PREPROCESSOR)).data_preprocessor
    files = [save_teacher(tmp_path / f'{seed}.pth', seed=seed) for seed in (1, 2)]

    def weights(config, ckpt=None):
        return teacher_fingerprint(config, ckpt, True, preprocessor)['weights']

    one, two = (weights(network(4), file) for file in files)
    assert one != two and one is not None
    ensemble = dict(type='mmwsl.EnsembleTeacher', models=[network(4)] * 2)
    assert weights({**ensemble, 'ckpts': files}) == f'{one} {two}'
    assert weights(network(4, init_cfg=dict(type='Pretrained', checkpoint=files[1]))) == two
    assert weights(network(4), str(tmp_path / 'nowhere.pth')) is None
    assert weights(network(4)) is None


def test_where_files_lie_does_not_matter(tmp_path):
    preprocessor = build(network(2, data_preprocessor=PREPROCESSOR)).data_preprocessor
    configs = [
        teacher_fingerprint(
            dict(type='mmwsl.EnsembleTeacher', models=[network(4)], ckpts=[ckpt]), None, True, preprocessor
        )['config']
        for ckpt in ('a', 'b')
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize('name', ['Mixup', 'mmdet.CachedMixUp', 'CutMix', 'Mosaic'])
def test_mixing_in_the_pipeline_is_refused(name):
    with pytest.raises(ValueError, match=f'{name} mixes images, and a teacher cache holds answers to single images'):
        refuse_mixing([dict(type='RandomFlip'), dict(type=name)])


def test_other_transforms_are_not_refused():
    refuse_mixing([dict(type='RandomFlip'), dict(type='AugMix'), dict(type='PackInputs')])
