"""mmdet and mmseg alongside an mmcv without compiled operators."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmwsl import compat
from tests.test_compat import WITHOUT_AND_WITH, in_a_fresh_process

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytestmark = pytest.mark.dense

COMPILED = importlib.util.find_spec('mmcv._ext') is not None and not isinstance(
    sys.modules.get('mmcv._ext'), compat._NoOperators
)


@pytest.mark.parametrize('module', ['mmdet.models', 'mmseg.models'])
def test_models_import_without_operators(module):
    without, with_it = in_a_fresh_process(
        WITHOUT_AND_WITH.format(path=compat.__file__, name='make_dense_packages_importable', module=module)
    )
    assert with_it == 'works'
    if without == 'works':
        pytest.skip(f'{module} imports here without it')
    assert "No module named 'mmcv._ext'" in without


@pytest.mark.parametrize(
    'base', ['mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', 'mmdet::gfl/gfl_r50_fpn_1x_coco.py']
)
def test_configs_inherit_from_the_installed_package(base, tmp_path):
    path = tmp_path / 'child.py'
    path.write_text(f'_base_ = [{base!r}]\n')
    assert Config.fromfile(path).model.backbone.depth == (18 if 'r18' in base else 50)


def test_the_environment_is_reported():
    script = (
        'import mmwsl.registry\nfrom mmdet.utils import collect_env\n'
        'import json; print(json.dumps("PyTorch" in collect_env()))'
    )
    assert in_a_fresh_process(script)


def reference_nms(boxes, scores, threshold, offset):
    """Each box by each better box, in Python numbers."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])  # stable
    kept = []
    for i in order:
        for j in kept:
            width = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0]) + offset
            height = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1]) + offset
            overlap = max(width, 0) * max(height, 0)
            areas = [(b[2] - b[0] + offset) * (b[3] - b[1] + offset) for b in (boxes[i], boxes[j])]
            if overlap > threshold * (sum(areas) - overlap):
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.0, 0.25, 0.5])
def test_nms_keeps_what_a_loop_keeps(threshold, offset):
    # whole numbers, so that both compute the same overlaps; scores with ties
    corner, size = torch.randint(0, 20, (200, 2)), torch.randint(0, 9, (200, 2))
    boxes, scores = torch.cat((corner, corner + size), 1), torch.randint(0, 50, (200,)) / 50
    expected = reference_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    kept = compat.nms(boxes.float(), scores, threshold, offset)
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected
    assert 0 < len(expected) < 200


def test_nms_of_two_boxes_by_hand():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [9, 9, 10, 10]])  # the first two share 2 of 6
    scores = torch.tensor([0.1, 0.9, 0.5])
    assert compat.nms(boxes, scores, 0.33).tolist() == [1, 2]
    assert compat.nms(boxes, scores, 0.34).tolist() == [1, 2, 0]


def test_nms_of_nothing():
    assert compat.nms(torch.empty(0, 4), torch.empty(0), 0.5).shape == (0,)


@pytest.mark.skipif(COMPILED, reason='mmcv has its operators here')
def test_mmcv_uses_it():
    from mmcv.ops import batched_nms

    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]])
    detections, kept = batched_nms(
        boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 0]), dict(type='nms', iou_threshold=0.5)
    )
    assert kept.tolist() == [1, 2]  # one of each class
    np.testing.assert_allclose(detections[:, 4], [0.9, 0.7])


@pytest.mark.skipif(COMPILED, reason='mmcv has its operators here')
@pytest.mark.parametrize(
    'call, words',
    [
        (lambda ops: ops.sigmoid_focal_loss(torch.rand(3, 2), torch.zeros(3, dtype=torch.long)), 'train on the CPU'),
        (
            lambda ops: ops.roi_align(torch.rand(1, 2, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2),
            'use_torchvision=True',
        ),
        (lambda ops: ops.soft_nms(torch.rand(3, 4), torch.rand(3)), "dict(type='nms'"),
    ],
    ids=['focal loss', 'roi_align', 'soft_nms'],
)
def test_an_operator_that_is_missing_names_itself_and_the_way(call, words):
    from mmcv import ops

    with pytest.raises(NotImplementedError, match='is not built here. Build mmcv') as error:
        call(ops)
    assert words in str(error.value)


def test_nothing_of_it_is_imported_before_it_is_needed():
    script = (
        'import json, sys\nimport mmwsl.registry\n'
        'print(json.dumps([name for name in ("mmdet", "mmseg", "pycocotools") if name in sys.modules]))'
    )
    assert in_a_fresh_process(script) == []


def test_all_else_works_without_the_extra():
    script = (
        'import json, sys\nsys.modules.update(mmdet=None, mmseg=None)\nimport mmwsl.registry, mmwsl.engine\n'
        'from mmengine.registry import MODELS\n'
        'print(json.dumps(type(MODELS.build(dict(type="mmwsl.WSLLoss"))).__name__))'
    )
    assert in_a_fresh_process(script) == 'WSLLoss'
