"""Segmentors through mmengine's Runner and the tools: by iterations, resumed, with a teacher that is checked."""

import itertools
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner

from tests.tiny import ROOT, load_tool

pytest.importorskip('mmseg')
pytestmark = pytest.mark.dense

BASE = f"""
_base_ = [{str(ROOT / 'configs/_base_/default_runtime.py')!r}]

data_preprocessor = dict(type='mmseg.SegDataPreProcessor', mean=[60] * 3, std=[60] * 3, size=(40, 40), seg_pad_val=255)


def segmentor(base, dropout=0):
    return dict(
        type='mmseg.EncoderDecoder', _scope_='mmseg', train_cfg=dict(), test_cfg=dict(mode='whole'),
        backbone=dict(type='mmwsl.CIFARResNet', depth=8, stem_channels=base, base_channels=base),
        decode_head=dict(type='FCNHead', in_channels=4 * base, in_index=0, channels=4 * base, num_convs=1,
                         concat_input=False, dropout_ratio=dropout, num_classes=11, align_corners=False,
                         norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss')))


def scenes(split, scenes, *transforms):
    return dict(type='mmwsl.DigitScenes', split=split, scenes=scenes, size=40, digits=(1, 2),
                pipeline=[*transforms, dict(type='mmseg.PackSegInputs')])


train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, sampler=dict(type='mmwsl.InfiniteViewSampler', shuffle=True),
    dataset=dict(type='mmwsl.SeededViews', dataset=scenes(
        'train', 48, dict(type='mmseg.RandomResize', scale=(40, 40), ratio_range=(0.8, 1.2), keep_ratio=True),
        dict(type='mmseg.RandomCrop', crop_size=(36, 36)))))  # images of several sizes
val_dataloader = test_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=scenes('test', 24))
val_evaluator = test_evaluator = dict(type='mmseg.IoUMetric')
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02, momentum=0.9))
train_cfg = dict(by_epoch=False, max_iters=10, val_interval=5)
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=-1), logger=dict(interval=2))
randomness = dict(seed=0)
"""
ALONE = 'model = segmentor(4)\ndel segmentor, scenes\n'
DISTILLED = """
model = dict(type='mmwsl.WSLDistill', architecture=segmentor(2, 0.3), teacher=segmentor(4), teacher_ckpt={!r},
             data_preprocessor=data_preprocessor, distiller=dict(type='mmwsl.WSLDistiller'))
custom_hooks = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.CheckTeacherHook', min_score={}, max_batches=4),
                dict(type='mmwsl.SampleRecordHook')]
del segmentor, scenes
"""
names = itertools.count()


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """File of a teacher that has not learned anything."""
    folder = tmp_path_factory.mktemp('teacher')
    cfg = Config.fromstring(BASE + ALONE, '.py')
    torch.manual_seed(1)
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / 'teacher.pth')
    return str(folder / 'teacher.pth')


@pytest.fixture
def config(tmp_path, teacher):
    """Writes the file of a distillation."""

    def written(min_score=0):
        path = tmp_path / 'config.py'
        path.write_text(BASE + DISTILLED.format(teacher, min_score))
        return str(path)

    return written


def run(script, monkeypatch, config, *args):
    """A tool in this process."""
    tool = load_tool(script)
    monkeypatch.setattr('sys.argv', [script, config, *map(str, args)])
    tool.main()


def train(monkeypatch, config, work_dir, *args):
    run(
        'train',
        monkeypatch,
        config,
        '--work-dir',
        work_dir,
        '--cfg-options',
        f'experiment_name=dense_{next(names)}',
        *args,
    )


class Kill(Hook):
    priority = 'HIGHEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx + 1 == 7:
            raise KeyboardInterrupt


def test_a_segmentor_resumes_exactly_by_iterations(tmp_path, config, monkeypatch):
    """With crops, dropout and a teacher that is checked and records that are logged: killed in the seventh of ten."""
    path, build = config(), Runner.from_cfg

    def killed(cfg):
        runner = build(cfg)
        runner.register_hook(Kill())
        return runner

    train(monkeypatch, path, tmp_path / 'unbroken')
    monkeypatch.setattr(Runner, 'from_cfg', killed)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, path, tmp_path / 'killed')
    monkeypatch.setattr(Runner, 'from_cfg', build)
    train(monkeypatch, path, tmp_path / 'killed', 'resume=True')
    expected, found = (
        torch.load(tmp_path / name / 'iter_10.pth', weights_only=False)['state_dict'] for name in ('unbroken', 'killed')
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    said = max((tmp_path / 'killed').glob('*/*.log')).read_text()
    assert 'weights of an unbroken' not in said
    assert 'Teacher: mIoU ' in said and ' on 4 validation images.' in said
    # of the student's last validation: that after five steps was before the kill, and its checkpoint is the best so far
    assert said.count('per class results') == 1
    scalars = max((tmp_path / 'killed').glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert all('wsl/w_p50' in line for line in map(json.loads, scalars) if 'loss' in line)


def test_a_teacher_that_knows_no_more_than_background_stops_the_run(tmp_path, config, monkeypatch):
    with pytest.raises(
        RuntimeError,
        match=r'has a mIoU of .* on 4 validation images; the best class everywhere has .* '
        r'is required\. Is teacher_ckpt the right file',
    ):
        train(monkeypatch, config(None), tmp_path)


@pytest.mark.parametrize('args', [['--teacher'], []], ids=['teacher', 'student'])
def test_a_segmentor_is_tested(tmp_path, config, monkeypatch, teacher, args):
    """The teacher's file is a network's own, and fits a student of its shape as well."""
    options = (
        []
        if args
        else [
            '--cfg-options',
            'model.architecture.backbone.stem_channels=4',
            'model.architecture.backbone.base_channels=4',
            'model.architecture.decode_head.in_channels=16',
            'model.architecture.decode_head.channels=16',
        ]
    )
    run(
        'test',
        monkeypatch,
        config(),
        *(args or [teacher]),
        '--work-dir',
        tmp_path,
        '--out',
        tmp_path / 'scores.json',
        '--out-item',
        'metrics',
        *options,
    )
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert 0 <= scores['mIoU'] < scores['aAcc'] <= 100
