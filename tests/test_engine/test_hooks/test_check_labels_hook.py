import pytest
from mmcv.transforms import BaseTransform
from mmengine.registry import DATASETS, TRANSFORMS

from mmwsl.datasets import Digits
from tests.tiny import network, run_digits


@DATASETS.register_module()
class MislabelledDigits(Digits):
    """Some of the digits have labels that are given."""

    def __init__(self, given, **kwargs):
        self.given = given
        super().__init__(**kwargs)

    def load_data_list(self):
        items = super().load_data_list()
        for place, label in self.given.items():
            items[place].update(gt_label=label, img_path=f'digits/{place}.png')
        return items


@TRANSFORMS.register_module()
class SevenIsTwo(BaseTransform):
    def transform(self, results):
        return {**results, 'gt_label': results['gt_label'] % 10}


def run(work_dir, hook='CheckLabelsHook', **loaders):
    changed = {f'{field}_dataloader': dict(dataset=dataset) for field, dataset in loaders.items()}
    return run_digits(work_dir, network(2), custom_hooks=[dict(type=f'mmwsl.{hook}')], **changed)


def mislabelled(given, split='train', transform=None):
    pipeline = [*([dict(type=transform)] if transform else []), dict(type='PackInputs')]
    return dict(type='MislabelledDigits', split=split, given=given, pipeline=pipeline)


@pytest.mark.parametrize(
    'label, said',
    [
        (10, r'none of 10 classes \(0 to 9\), and 1 more of 600 images have such labels. Correct'),
        (-1, 'none of 10 classes'),
        (-100, 'Losses ignore -100, so it would train nothing. Correct the labels'),
    ],
)
@pytest.mark.parametrize('hook', ['CheckLabelsHook', 'CheckTeacherHook'])
def test_labels_that_are_no_class_are_named_before_the_first_step(tmp_path, label, said, hook):
    with pytest.raises(ValueError, match=f'^train_dataloader: digits/7.png has the label {label}, which is .*{said}'):
        run(tmp_path, hook, train=dict(dataset=mislabelled({7: label, 300: 55})))


def test_validation_images_are_looked_at_too(tmp_path):
    with pytest.raises(ValueError, match='^val_dataloader: digits/1000.png has the label 12'):
        run(tmp_path, val=mislabelled({1000: 12}, 'test'))


def test_labels_of_joined_datasets(tmp_path):
    joined = dict(type='ConcatDataset', datasets=[mislabelled({}), mislabelled({3: 10})], _delete_=True)
    with pytest.raises(ValueError, match='digits/3.png has the label 10'):
        run(tmp_path, train=dict(dataset=joined))


def test_labels_may_be_mapped_to_classes_by_the_pipeline(tmp_path):
    assert run(tmp_path, train=dict(dataset=mislabelled({7: 12}, transform='SevenIsTwo'))).iter == 6


def test_right_labels_are_fine(tmp_path):
    assert run(tmp_path).iter == 6
