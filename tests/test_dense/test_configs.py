"""The configs of scenes: what they build, and that it trains and is tested."""

import json
import sys

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint

from mmwsl.engine.cache_building import build_model
from mmwsl.models.distillers.detectors import LOSSES
from tests.tiny import ROOT, build, load_tool

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmdet.datasets import CocoDataset

pytestmark = pytest.mark.dense


def load(name, folder, task='seg'):
    """A config, at a size that takes seconds."""
    cfg = Config.fromfile(ROOT / f'configs/{task}/{name}_digits-{task}.py')
    init_default_scope(cfg.default_scope)
    cfg.train_dataloader.dataset.dataset.scenes = 4
    cfg.train_dataloader.batch_size = 2
    cfg.val_dataloader.dataset.scenes = 2
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if 'CheckTeacher' not in hook['type']]
    cfg.work_dir, cfg.experiment_name = str(folder), f'{name}{folder.name}'
    cfg.randomness.seed = 0
    return cfg


@pytest.fixture(autouse=True)
def _plain_dumps(monkeypatch):
    """A run lays out its config again and again, for seconds."""
    monkeypatch.setattr(Config, 'pretty_text', property(lambda cfg: repr(cfg.to_dict())))


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Files of untrained teachers, by task."""
    folder = tmp_path_factory.mktemp('teacher')
    for task in ('det', 'seg'):
        torch.manual_seed(0)
        model = build(load('teacher', folder, task).model)
        torch.save(dict(state_dict=model.state_dict()), folder / f'{task}.pth')
    return {task: str(folder / f'{task}.pth') for task in ('det', 'seg')}


def trained(name, teachers, folder, task):
    cfg = load(name, folder, task)
    if name != 'student':
        cfg.model.teacher_ckpt = teachers[task]
    if task == 'det':  # an untrained network predicts something, too
        cfg.model.get('architecture', cfg.model).test_cfg.score_thr = 0.0
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.mark.parametrize(
    'name, task',
    [
        ('student', 'seg'),
        ('kd', 'seg'),
        ('wsl', 'seg'),
        ('cwd', 'seg'),
        ('student', 'det'),
        ('kd', 'det'),
        ('wsl-plain', 'det'),
    ],
)
def test_two_steps_and_a_validation(name, task, teachers, tmp_path):
    runner = trained(name, teachers, tmp_path, task)
    assert runner.iter == 2
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 and all(map(torch.isfinite, torch.tensor(losses)))
    metric = dict(seg='mIoU', det='coco/bbox_mAP')[task]
    assert runner.message_hub.get_scalar(f'val/{metric}').current() >= 0
    if name == 'cwd':  # MMRazor's loss of the logits before they are resized
        assert runner.model.distiller.student_recorders.get_recorder('low_logits').source == 'decode_head.conv_seg'


class Kill(Hook):
    """Stops a run in its second epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            raise KeyboardInterrupt


def test_a_detector_resumes_exactly(teachers, tmp_path):
    """With images that are flipped at random, and records that are logged."""

    def runner(name, **kwargs):
        cfg = load('wsl', tmp_path / name, 'det')
        cfg.model.teacher_ckpt = teachers['det']
        cfg.train_dataloader.dataset.dataset.pipeline.insert(1, dict(type='mmdet.RandomFlip', prob=0.5))
        cfg.custom_hooks.append(dict(type='mmwsl.SampleRecordHook'))
        cfg.default_hooks.logger.interval = 1
        cfg.merge_from_dict(dict(train_cfg=dict(max_epochs=2, val_interval=5), **kwargs))
        cfg.experiment_name = f'{name}{len(kwargs)}'
        return Runner.from_cfg(cfg)

    unbroken = runner('unbroken')
    unbroken.train()
    killed = runner('killed')  # not before: it draws its weights when it is trained
    killed.register_hook(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = runner('killed', resume=True)
    resumed.train()
    assert resumed.iter == unbroken.iter == 4
    torch.testing.assert_close(resumed.model.state_dict(), unbroken.model.state_dict(), rtol=0, atol=0)
    assert 0 < resumed.message_hub.get_scalar('train/wsl/w_p50').current() < 1


@pytest.fixture(scope='module')
def streets(tmp_path_factory):
    """Three images in Cityscapes' layout."""
    root = tmp_path_factory.mktemp('cityscapes')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        images, maps = (root / part / split / 'town' for part in ('leftImg8bit', 'gtFine'))
        for folder in (images, maps):
            folder.mkdir(parents=True)
        for i in range(3):
            classes = rng.integers(0, 19, (4, 8)).repeat(24, 0).repeat(24, 1).astype(np.uint8)
            classes[:8] = 255
            mmcv.imwrite(rng.integers(0, 255, (96, 192, 3)).astype(np.uint8), str(images / f'{i}_leftImg8bit.png'))
            mmcv.imwrite(classes, str(maps / f'{i}_gtFine_labelTrainIds.png'))
    return root


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pspnet', 'deeplabv3'])
def test_two_steps_of_a_published_pair(name, streets, tmp_path):
    cfg = Config.fromfile(ROOT / f'configs/seg/wsl_{name}-r101_{name}-r18_cityscapes.py')
    init_default_scope(cfg.default_scope)
    assert cfg.model.pop('teacher_ckpt').endswith('.pth')
    cfg.model.data_preprocessor.size = (64, 64)
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    loader.dataset.dataset.data_root = str(streets)
    for transform in loader.dataset.dataset.pipeline:
        transform.update(dict(crop_size=(64, 64)) if 'crop_size' in transform else {})
        transform.update(dict(scale=(192, 96)) if 'scale' in transform else {})
    model = MODELS.build(cfg.model)
    model.architecture = revert_sync_batchnorm(model.architecture)  # it needs a GPU
    for network in (model.architecture, model.teacher):
        network.backbone.init_cfg = None  # a download
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=loader,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2),
        default_hooks=dict(logger=dict(type='LoggerHook', log_metric_by_epoch=False)),
        custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
        default_scope='mmseg',
        experiment_name=name,
        randomness=dict(seed=0),
    )
    runner.train()
    wsl, auxiliary = (
        runner.message_hub.get_scalar(f'train/{key}').data[0] for key in ('distill.loss_wsl', 'student.aux.loss_ce')
    )
    assert len(wsl) == len(auxiliary) == 2 and np.isfinite([*wsl, *auxiliary]).all()
    assert model.distiller.distill_losses['loss_wsl'].ignore_index == 255


@pytest.fixture
def roads(tmp_path):
    """Two images in CamVid's layout; the upper rows are void, and class 10 is there."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for i in range(2):
            classes = rng.integers(0, 11, (4, 6)).repeat(20, 0).repeat(20, 1).astype(np.uint8)
            classes[:8], classes[8:12] = 11, 10
            mmcv.imwrite(rng.integers(0, 255, (80, 120, 3)).astype(np.uint8), str(tmp_path / split / f'{i}.png'))
            mmcv.imwrite(classes, str(tmp_path / f'{split}annot/{i}.png'))
    return tmp_path


@pytest.mark.slow
def test_two_steps_and_a_validation_on_camvid(roads, tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/seg/wsl_pspnet-r101_pspnet-r18_camvid.py')
    cfg.merge_from_dict(
        {
            'work_dir': str(tmp_path / 'work'),
            'experiment_name': 'camvid',
            'train_dataloader.batch_size': 2,
            'model.teacher_ckpt': None,
            'model.data_preprocessor.size': (64, 64),
            'param_scheduler': None,
            'train_cfg': dict(max_iters=2, val_interval=2),
            'randomness': dict(seed=0),
            'test_dataloader': None,
            'test_cfg': None,
            'test_evaluator': None,
            'custom_hooks': [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.CheckTeacherHook', min_score=0)],
        }
    )
    for network, depth in ((cfg.model.architecture, 18), (cfg.model.teacher, 50)):
        network.pretrained, network.backbone.depth = None, depth
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        dataset = loader.dataset.get('dataset', loader.dataset)
        dataset.data_root = str(roads)
        for transform in dataset.pipeline:
            transform.update(dict(crop_size=(64, 64)) if 'crop_size' in transform else {})
            transform.update(dict(scale=(120, 80)) if 'scale' in transform else {})
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.model.distiller.distill_losses['loss_wsl'].ignore_index == 11
    losses = runner.message_hub.get_scalar('train/distill.loss_wsl').data[0]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() <= 100


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Four images with two boxes each in COCO's layout."""
    root = tmp_path_factory.mktemp('coco')
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(4):
        mmcv.imwrite(rng.integers(0, 255, (96, 128, 3)).astype(np.uint8), str(root / f'train2017/{i}.jpg'))
        images.append(dict(id=i, file_name=f'{i}.jpg', width=128, height=96))
        boxes += [
            dict(id=2 * i + j, image_id=i, category_id=j + 1, iscrowd=0, area=1600, bbox=[10 + 50 * j, 20, 40, 40])
            for j in range(2)
        ]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
    (root / 'annotations').mkdir()
    (root / 'annotations/instances_train2017.json').write_text(
        json.dumps(dict(images=images, annotations=boxes, categories=categories))
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gfl-r101_gfl-r50', 'retinanet-r101_retinanet-r50', 'rtmdet-s_rtmdet-tiny'])
def test_two_steps_of_a_published_pair_of_detectors(name, photos, tmp_path):
    cfg = Config.fromfile(ROOT / f'configs/det/wsl_{name}_coco.py')
    init_default_scope(cfg.default_scope)
    assert cfg.model.pop('teacher_ckpt').endswith('.pth')
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False, batch_size=2, pin_memory=False)
    dataset = loader.dataset.get('dataset', loader.dataset)
    dataset.data_root = f'{photos}/'
    for transform in dataset.pipeline:
        transform.update({key: (128, 128) for key in ('scale', 'img_scale', 'crop_size', 'size') if key in transform})
    model = MODELS.build(cfg.model)
    model.architecture = revert_sync_batchnorm(model.architecture)  # it needs a GPU
    for network in (model.architecture, model.teacher):
        network.backbone.init_cfg = None  # a download
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=loader,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        custom_hooks=[hook for hook in cfg.custom_hooks if 'CheckTeacher' not in hook.type],
        default_scope='mmdet',
        experiment_name=name,
        randomness=dict(seed=0),
        default_hooks=dict(checkpoint=None),
    )
    runner.train()
    found = runner.message_hub.get_scalar('train/distill.loss_wsl').data[0]
    assert len(found) == 2 and np.isfinite(found).all() and min(found) > 0
    assert model.distiller.detector.classes == 80


CELL = '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>20</ymin><xmax>{}</xmax><ymax>120</ymax></bndbox></object>'


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    """Four images with two boxes each in VOC's layout; one box of the first is empty."""
    root = tmp_path_factory.mktemp('bccd')
    rng = np.random.default_rng(0)
    for folder in ('ImageSets/Main', 'Annotations'):
        (root / folder).mkdir(parents=True)
    for i in range(4):
        mmcv.imwrite(rng.integers(0, 255, (480, 640, 3)).astype(np.uint8), str(root / f'JPEGImages/{i}.jpg'))
        boxes = CELL.format('RBC', 100, 200) + CELL.format('WBC', 300, 400 if i else 300)
        (root / f'Annotations/{i}.xml').write_text(
            f'<annotation><size><width>640</width><height>480</height></size>{boxes}</annotation>'
        )
    for split in ('train', 'val', 'test'):
        (root / f'ImageSets/Main/{split}.txt').write_text('0\n1\n2\n3\n')
    return root


@pytest.mark.skipif(not (ROOT / 'data/bccd').exists(), reason='needs data/bccd')
def test_the_cells_are_those_of_the_page():
    cfg = Config.fromfile(ROOT / 'configs/det/student_bccd.py')
    init_default_scope(cfg.default_scope)
    datasets = [
        DATASETS.build(dict(dataset, data_root=f'{ROOT}/data/bccd/'))
        for dataset in (cfg.train_dataloader.dataset.dataset, cfg.val_dataloader.dataset, cfg.test_dataloader.dataset)
    ]
    assert [len(dataset) for dataset in datasets] == [205, 87, 72]
    boxes = [
        box['bbox_label']
        for dataset in datasets
        for i in range(len(dataset))
        for box in dataset.get_data_info(i)['instances']
    ]
    assert np.bincount(boxes).tolist() == [4155, 372, 361]


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'student',
        'wsl',
        'wsl-plain',
        'bckd',
        'kd',
        'cwd',
        'ld',
        'teacher_retinanet',
        'student_retinanet',
        'kd_retinanet',
        'wsl_retinanet',
    ],
)
def test_two_steps_and_a_validation_on_cells(name, cells, tmp_path):
    cfg = Config.fromfile(ROOT / f'configs/det/{name}_bccd.py')
    init_default_scope(cfg.default_scope)
    for dataset in (cfg.train_dataloader.dataset.dataset, cfg.val_dataloader.dataset, cfg.test_dataloader.dataset):
        dataset.data_root = f'{cells}/'
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    if name.partition('_')[0] not in ('student', 'teacher'):
        assert cfg.model.pop('teacher_ckpt')
    if name == 'ld':  # a path from the root of the project
        cfg.model.teacher_config = str(ROOT / cfg.model.teacher_config)
    cfg.model.get('architecture', cfg.model).test_cfg.score_thr = 0.0
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook['type'] != 'mmwsl.CheckTeacherHook']
    cfg.work_dir, cfg.experiment_name, cfg.randomness.seed = str(tmp_path), f'{name}_cells', 0
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert runner.message_hub.get_scalar('val/coco/bbox_mAP').current() >= 0


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('[sd]e[gt]/*.py')), ids=lambda path: path.stem)
def test_loaders_without_workers_say_so_to_other_tools(path):
    cfg = Config.fromfile(path)
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        assert loader.get('persistent_workers', True) == (loader.num_workers > 0)


def test_weighted_and_plain_soft_labels_differ_in_the_weight_alone(tmp_path):
    kd, wsl = (load(name, tmp_path).model.distiller.distill_losses for name in ('kd', 'wsl'))
    assert kd.loss_kd.pop('weighting') == 'one'
    assert kd.loss_kd == wsl.loss_wsl
    kd, plain, wsl = (load(name, tmp_path, 'det').model.distiller.distill_losses for name in ('kd', 'wsl-plain', 'wsl'))
    assert [losses.loss_wsl.pop('weighting')['type'] for losses in (plain, wsl)] == ['WSLWeighting', 'ProductWeighting']
    assert kd.loss_kd == plain.loss_wsl == wsl.loss_wsl


def test_a_detector_is_distilled_like_this_unless_told_otherwise(tmp_path):
    assert load('wsl', tmp_path, 'det').model.distiller.distill_losses.loss_wsl == {**LOSSES[True], 'loss_weight': 1.0}


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_a_dense_teacher_is_not_cached(task, tmp_path):
    cfg = load('wsl', tmp_path, task)
    cfg.model.teacher_ckpt = None
    with pytest.raises(ValueError, match='a teacher cache holds one answer for each image'):
        build_model(cfg)


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_the_students_file_is_a_plain_networks(task, teachers, tmp_path, monkeypatch):
    """The same scores to the bit, without this package's model, loops or hooks."""
    runner = trained('wsl', teachers, tmp_path, task)
    convert = load_tool('model_converters/convert_kd_ckpt_to_student')
    monkeypatch.setattr(
        sys, 'argv', ['convert', str(tmp_path / 'epoch_1.pth'), '--out-path', str(tmp_path / 'student.pth')]
    )
    convert.main()
    plain = build(load('student', tmp_path, task).model)
    found = load_checkpoint(plain, str(tmp_path / 'student.pth'), map_location='cpu', strict=True)
    assert set(found['state_dict']) == set(plain.state_dict())
    plain.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), runner.model.student.eval()(images))
