"""MMRazor's own configs for detectors and segmentors: each is built and takes a step, or says what it lacks."""

from pathlib import Path

import mmrazor
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmwsl import compat
from mmwsl.datasets import DigitScenes
from tests.test_dense.detectors import PIPELINE

pytestmark = pytest.mark.dense

CONFIGS = Path(mmrazor.__file__).parent / '.mim/configs/distill'
PATHS = sorted([*CONFIGS.glob('mmdet/*/*.py'), *CONFIGS.glob('mmseg/*/*.py')])
LACKING = {  # an operator of mmcv that is not built here
    'cwd_fpn_frcnn_r101_frcnn_r50_1x_coco': 'RoIAlign',
    'fbkd_fpn_faster-rcnn_r101_faster-rcnn_r50_1x_coco': 'RoIAlign',
    'pkd_fpn_faster-rcnn_r101_faster-rcnn_r50_2x_coco': 'RoIAlign',
    'pkd_fpn_reppoints_x101-dcn_reppoints_r50_2x_coco': 'deform_conv_forward',
}


def without_downloads(config):
    """Random weights in place of what a config would load."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in ('init_cfg', 'teacher_ckpt'):
            config[key] = None
        elif key == 'pretrained':
            config[key] = False if 'cfg_path' in config else None
        else:
            without_downloads(value)


def batch(task):
    scenes = DigitScenes(
        scenes=2, size=64, task=task, pipeline=PIPELINE if task == 'det' else [dict(type='mmseg.PackSegInputs')]
    )
    return pseudo_collate([scenes[i] for i in range(2)])


@pytest.mark.parametrize('old, new', compat.MMDET_CONFIGS.items())
def test_a_config_that_mmdet_renamed_is_found(old, new):
    assert Path(Config._get_cfg_path(f'mmdet::{old}', '')[0]).as_posix().endswith(f'mmdet/.mim/configs/{new}')


@pytest.mark.slow
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_a_config_of_mmrazor_takes_a_step(path):
    task = path.parts[-3].removeprefix('mm')
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    without_downloads(cfg.model)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.train()
    model.data_preprocessor.size = (64, 64)  # a segmentor's, who would pad them to 512 x 1024
    data = model.data_preprocessor(batch(task), True)

    def step():
        loss, logged = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        return logged

    if lacks := LACKING.get(path.stem):
        with pytest.raises((RuntimeError, NotImplementedError, ImportError), match=lacks):
            step()
        return
    logged = step()
    distilled = [value for name, value in logged.items() if name.startswith('distill.')]
    assert distilled and torch.isfinite(torch.stack([*distilled, logged['loss']])).all()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.student.parameters())
