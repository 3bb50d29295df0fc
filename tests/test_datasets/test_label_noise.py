import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmwsl.datasets import LabelNoise
from mmwsl.datasets.device import DeviceDataset
from tests.tiny import ROOT


def labels(noise, count=9000):
    """What it makes of images labelled 0, 1, ..., 9, 0, ..."""
    return np.array([noise(dict(sample_idx=i, gt_label=i % 10))['gt_label'] for i in range(count)])


def test_share_of_wrong_labels_and_all_other_classes_alike():
    offset = (labels(LabelNoise(0.3, 10)) - np.arange(9000)) % 10
    assert abs((offset > 0).sum() - 2700) < 5 * np.sqrt(9000 * 0.3 * 0.7)
    counts = np.bincount(offset, minlength=10)[1:]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 26.1  # chi-square, 8 degrees of freedom, 0.1 %


@pytest.mark.parametrize('prob, wrong', [(0.0, 0), (1.0, 9000)])
def test_none_and_all(prob, wrong):
    assert (labels(LabelNoise(prob, 10)) != np.arange(9000) % 10).sum() == wrong


def test_noise_belongs_to_seed_and_image_alone():
    first = labels(LabelNoise(0.5, 10, seed=1), 100)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    state = np.random.get_state()[1].tolist()
    assert (labels(LabelNoise(0.5, 10, seed=1), 100) == first).all()
    assert np.random.get_state()[1].tolist() == state
    assert (labels(LabelNoise(0.5, 10, seed=2), 100) != first).any()


@pytest.mark.parametrize(
    'kwargs', [dict(prob=1.1, num_classes=10), dict(prob=-0.1, num_classes=10), dict(prob=0.5, num_classes=1)]
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'got prob={kwargs["prob"]} and num_classes={kwargs["num_classes"]}'):
        LabelNoise(**kwargs)


@pytest.mark.parametrize('label', [None, 10, -1, [1, 2]])
def test_label_that_is_no_class(label):
    with pytest.raises(ValueError, match=r'one label in \[0, 10\)'):
        LabelNoise(0.5, 10)(dict(sample_idx=0, gt_label=label) if label is not None else dict(sample_idx=0))


def test_image_without_a_place():
    with pytest.raises(ValueError, match=r"needs sample_idx.*got only \['gt_label', 'img'\]"):
        LabelNoise(0.5, 10)(dict(img=None, gt_label=1))


def test_parts_of_a_joined_dataset_have_noise_of_their_own():
    init_default_scope('mmpretrain')
    part = dict(
        type='mmwsl.Digits',
        split='train',
        pipeline=[dict(type='mmwsl.LabelNoise', prob=0.5, num_classes=10), dict(type='PackInputs')],
    )
    joined = DATASETS.build(dict(type='mmwsl.SeededViews', dataset=dict(type='ConcatDataset', datasets=[part, part])))
    alone = DATASETS.build(part)
    noisy = [joined[i]['data_samples'].gt_label.item() for i in range(1200)]
    assert noisy[:600] == [alone[i]['data_samples'].gt_label.item() for i in range(600)]
    # 0.25 + 0.25 if one of the two labels is wrong, 0.25 * 8 / 9 if both are; alike with 600 images: never
    assert np.mean(np.array(noisy[600:]) != noisy[:600]) == pytest.approx(0.72, abs=0.1)


def test_training_labels_are_noisy_and_test_labels_are_not():
    cfg = Config.fromfile(ROOT / 'configs/wsl_digits_noise.py')
    init_default_scope(cfg.default_scope)

    def wrong(dataset):
        return np.mean(
            [
                dataset[i]['data_samples'].gt_label.item() != dataset.get_data_info(i)['gt_label']
                for i in range(len(dataset))
            ]
        )

    train = DATASETS.build(cfg.train_dataloader.dataset)
    assert 0.15 < wrong(train) < 0.25
    assert wrong(DATASETS.build(cfg.val_dataloader.dataset)) == 0
    device = DeviceDataset(cfg.train_dataloader.dataset.dataset, device='cpu')  # it draws from no generator
    assert device.labels.tolist() == [train[i]['data_samples'].gt_label.item() for i in range(600)]
