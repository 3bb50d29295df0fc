"""A detector as teacher, scored by mmdet's own metrics."""

import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from mmwsl.datasets import DigitScenes
from mmwsl.engine.ratings import rated

pytest.importorskip('mmdet')
pytestmark = pytest.mark.dense
IMAGES, LOOKED_AT = 12, 4


@pytest.fixture(scope='module')
def scenes():
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'instances')
    return DigitScenes(
        'test',
        'det',
        scenes=IMAGES,
        size=64,
        pipeline=[dict(type='mmdet.LoadAnnotations', with_bbox=True), dict(type='mmdet.PackDetInputs', meta_keys=keys)],
    )


@pytest.fixture
def ann_file(scenes, tmp_path):
    """The same boxes as a file of COCO, which knows all images."""
    infos = [scenes.get_data_info(i) for i in range(IMAGES)]
    boxes = [(info['img_id'], box['bbox_label'], box['bbox']) for info in infos for box in info['instances']]
    annotations = [
        dict(
            id=number,
            image_id=image,
            category_id=label,
            iscrowd=0,
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
        )
        for number, (image, label, (x1, y1, x2, y2)) in enumerate(boxes, 1)
    ]
    (tmp_path / 'boxes.json').write_text(
        json.dumps(
            dict(
                images=[dict(id=info['img_id'], width=64, height=64) for info in infos],
                annotations=annotations,
                categories=[dict(id=i, name=name) for i, name in enumerate(scenes.metainfo['classes'])],
            )
        )
    )
    return str(tmp_path / 'boxes.json')


class Knowing:
    """Predicts what is there, or classes that are wrong by some."""

    def __init__(self, wrong):
        self.wrong = wrong

    def __call__(self, inputs, data_samples, mode):
        assert mode == 'predict'
        for sample in data_samples:
            truth = sample.gt_instances
            boxes = torch.as_tensor(getattr(truth.bboxes, 'tensor', truth.bboxes))
            sample.pred_instances = InstanceData(
                bboxes=boxes, labels=(truth.labels + self.wrong) % 10, scores=torch.ones(len(boxes))
            )
        return data_samples


@pytest.mark.parametrize('wrong, score', [(0, 1.0), (1, 0.0)])
@pytest.mark.parametrize(
    'metric, name',
    [
        (dict(type='mmdet.VOCMetric'), 'pascal_voc/mAP'),
        (dict(type='mmdet.CocoMetric', metric='bbox'), 'coco/bbox_mAP'),
        (dict(type='mmdet.CocoMetric', ann_file=True), 'coco/bbox_mAP'),
    ],
    ids=str,
)
def test_a_teacher_that_knows_some_images_by_heart(scenes, ann_file, metric, name, wrong, score):
    """Of these alone it is scored, though a file of COCO has more."""
    if 'ann_file' in metric:
        metric = dict(metric, ann_file=ann_file)
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = scenes.metainfo
    loader = DataLoader(scenes, batch_size=2, collate_fn=pseudo_collate)
    runner = SimpleNamespace(hooks=[], val_loop=SimpleNamespace(evaluator=evaluator, dataloader=loader))
    model = SimpleNamespace(data_preprocessor=lambda batch, training: batch, teacher=Knowing(wrong))
    found = rated(runner, model, LOOKED_AT // 2)
    assert found.name == name and found.images == LOOKED_AT and found.constant is None
    assert found.value == pytest.approx(score, abs=0.01)
    assert evaluator.metrics[0].results == []
