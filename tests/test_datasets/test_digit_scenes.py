import numpy as np
import pytest
from mmengine.registry import DATASETS
from scipy import ndimage

from mmwsl.datasets import DigitScenes


def scenes(task='seg', **kwargs):
    return DigitScenes(task=task, scenes=12, **kwargs)


def test_three_tasks_tell_of_the_same_scenes():
    several = 0
    for seg, det, multi in zip(scenes('seg'), scenes('det'), scenes('multi'), strict=True):
        np.testing.assert_array_equal(seg['img'], det['img'])
        np.testing.assert_array_equal(seg['img'], multi['img'])
        assert multi['gt_label'] == sorted({found['bbox_label'] for found in det['instances']})
        several += len(det['instances']) > 1
        left = seg['gt_seg_map'].copy()
        for found in det['instances']:
            x1, y1, x2, y2 = map(int, found['bbox'])
            inside = seg['gt_seg_map'][y1:y2, x1:x2] == found['bbox_label'] + 1
            assert inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all()  # the box is tight
            left[y1:y2, x1:x2] = 0
        assert set(np.unique(left)) <= {0, 255}  # no ink outside the boxes
    assert several > 3


def test_what_is_on_the_canvas():
    scene = scenes()[3]
    assert scene['img'].shape == (64, 64, 3) and scene['img'].dtype == np.uint8
    classes = scene['gt_seg_map']
    assert 255 in classes and 0 in classes
    light = scene['img'][..., 0]
    ink = light[(classes > 0) & (classes < 255)].mean()
    assert ink > light[classes == 255].mean() > light[classes == 0].mean()
    # soft edges separate ink from background, but where a digit is cut off by its own image
    ink = (classes > 0) & (classes < 255)
    assert (ndimage.binary_dilation(ink) & (classes == 0)).sum() < 0.2 * ink.sum()


def test_scenes_repeat_and_differ():
    first, again, test = scenes(), scenes(), scenes(split='test')
    np.testing.assert_array_equal(first[5]['img'], again[5]['img'])
    assert (first[5]['img'] != first[6]['img']).any()
    assert (first[5]['img'] != test[5]['img']).any()


def test_it_is_registered_with_names_and_colours():
    dataset = DATASETS.build(dict(type='mmwsl.DigitScenes', scenes=1, size=40, digits=(1, 1)))
    assert dataset.metainfo['classes'] == ('background', *'0123456789')
    assert len(set(map(tuple, dataset.metainfo['palette']))) == 11
    assert dataset[0]['img'].shape == (40, 40, 3)
    assert scenes('det').metainfo['classes'] == tuple('0123456789') and len(scenes('det').metainfo['palette']) == 10


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(task='depth'), "^task should be one of .*got 'depth'"),
        (dict(size=20), '^size should be at least 32 pixels.*size=20'),
        (dict(digits=(3, 1)), 'digits=\\(3, 1\\)'),
        (dict(split='val'), "^split should be 'train' or 'test'"),
    ],
)
def test_what_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        scenes(**kwargs)
