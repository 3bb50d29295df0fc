from collections import Counter

import numpy as np
import pytest
from mmengine.registry import DATASETS
from sklearn.datasets import load_digits

from mmwsl.datasets.digits import Digits


@pytest.fixture(scope='module')
def splits():
    return {split: Digits(split=split) for split in ('train', 'test')}


def images_and_labels(dataset):
    items = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [item['img'] for item in items], [item['gt_label'] for item in items]


def as_counter(images, labels):
    return Counter((np.asarray(image).astype(int).tobytes(), int(label)) for image, label in zip(images, labels))


def test_sizes(splits):
    assert (len(splits['train']), len(splits['test'])) == (600, 1197)


def test_the_splits_are_disjoint_and_leave_nothing_out(splits):
    source = load_digits()
    both = as_counter(*images_and_labels(splits['train'])) + as_counter(*images_and_labels(splits['test']))
    assert both == as_counter(source.images, source.target)


def test_the_splits_are_stratified(splits):
    whole = Counter(load_digits().target.tolist())
    for dataset in splits.values():
        counts = Counter(images_and_labels(dataset)[1])
        for digit in range(10):
            assert abs(counts[digit] - whole[digit] * len(dataset) / 1797) < 1


def test_the_split_is_fixed(splits):
    images, labels = images_and_labels(splits['train'])
    images_again, labels_again = images_and_labels(Digits(split='train'))
    assert np.array_equal(images, images_again)
    assert labels == labels_again
    assert labels[:12] == [3, 5, 7, 3, 6, 9, 2, 6, 5, 0, 8, 7]


def test_order_is_that_of_the_source(splits):
    position = {image.astype(int).tobytes(): i for i, image in enumerate(load_digits().images)}
    positions = [position[image.astype(int).tobytes()] for image in images_and_labels(splits['train'])[0]]
    assert positions == sorted(positions)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_images_and_labels(splits, split):
    images, labels = images_and_labels(splits[split])
    assert {image.shape for image in images} == {(8, 8, 1)}
    assert {image.dtype for image in images} == {np.dtype('uint8')}
    assert (np.min(images), np.max(images)) == (0, 16)
    assert {type(label) for label in labels} == {int}
    assert set(labels) == set(range(10))


def test_images_are_upright(splits):
    source = load_digits()
    image, label = (values[0] for values in images_and_labels(splits['train']))
    same = (source.images == image[..., 0]).all(axis=(1, 2))
    assert source.target[same].tolist() == [label]


def test_classes(splits):
    assert splits['train'].metainfo['classes'] == ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')


def test_default_is_to_train():
    assert len(Digits()) == 600


def test_builds_from_a_config_with_a_pipeline():
    dataset = DATASETS.build(
        dict(
            type='mmwsl.Digits', split='test', test_mode=True, indices=20, pipeline=[dict(type='mmpretrain.PackInputs')]
        )
    )
    assert len(dataset) == 20
    assert dataset[0]['inputs'].shape == (1, 8, 8)
    assert dataset[0]['data_samples'].gt_label.item() == dataset.get_data_info(0)['gt_label']


@pytest.mark.parametrize('split', ['val', '', None, 'Train'])
def test_a_wrong_split_is_named(split):
    with pytest.raises(ValueError, match=f"split should be 'train' or 'test', got {split!r}"):
        Digits(split=split)
