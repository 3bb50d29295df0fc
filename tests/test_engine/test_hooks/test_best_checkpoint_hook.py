from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import MessageHub
from mmengine.registry import METRICS
from mmengine.runner import Runner

from mmwsl.engine import add_hooks, latest_checkpoint
from mmwsl.engine.hooks import BestCheckpointHook
from tests.test_engine.test_hooks.test_exact_resume_hook import Kill
from tests.tiny import ROOT, digits_config, network


@METRICS.register_module(force=True)
class Scripted(BaseMetric):
    """A segmentor's figures, of which mIoU is written down beforehand, one for each epoch."""

    values = ()

    def process(self, data_batch, data_samples):
        self.results.append(None)

    def compute_metrics(self, results):
        return dict(aAcc=99.0, mIoU=self.values[MessageHub.get_current_instance().get_info('epoch')])


def scripted(work_dir, values, model=None, **kwargs):
    """A config of a run whose mIoU is known, with the hooks that training has."""
    cfg = digits_config(
        work_dir,
        model or network(2),
        len(values),
        dict(max_keep_ckpts=-1),
        custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
        train_dataloader=dict(batch_size=150),
        val_dataloader=dict(batch_size=600),
        **kwargs,
    )
    cfg.val_evaluator, Scripted.values = dict(type='Scripted'), values
    add_hooks(cfg)
    return cfg


def chosen(metrics, **settings):
    hook = BestCheckpointHook(interval=1, **settings)
    said = []
    runner = SimpleNamespace(hooks=[hook], logger=SimpleNamespace(warning=said.append))
    return hook, hook._choose(runner, metrics), said


@pytest.mark.parametrize(
    'metrics, name, rule',
    [
        ({'accuracy/top1': 50.0, 'accuracy/top5': 90.0}, 'accuracy/top1', 'greater'),
        ({'aAcc': 90.0, 'mIoU': 50.0, 'mAcc': 60.0}, 'mIoU', 'greater'),
        ({'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.5}, 'coco/bbox_mAP', 'greater'),
        ({'multi-label/mAP': 50.0}, 'multi-label/mAP', 'greater'),
        ({'single-label/precision': 70.0, 'single-label/f1-score': 50.0}, 'single-label/f1-score', 'greater'),
        ({'loss': 0.5}, 'loss', 'less'),
    ],
)
def test_the_figure_that_counts_decides_by_its_name(metrics, name, rule):
    hook, decided, said = chosen(metrics)
    assert decided and (hook.key_indicators, hook.rules, said) == ([name], [rule], [])


def test_a_figure_whose_name_tells_no_rule_is_said_once_and_needs_one():
    hook, decided, said = chosen({'kappa': 0.5})
    assert not decided and hook.save_best is None
    assert said == [
        'No best checkpoint is kept, since it is unknown whether more or less of kappa is better. Set '
        "default_hooks.checkpoint.rule='greater' or 'less'."
    ]
    hook, decided, said = chosen({'kappa': 0.5}, rule='less')
    assert decided and (hook.rules, said) == (['less'], [])


@pytest.mark.parametrize('kill', [('train', 3), ('val', 2)], ids=str)
def test_a_run_that_is_killed_and_resumed_keeps_the_best_of_all_its_epochs(tmp_path, kill):
    values = [50.0, 70.0, 70.0]
    first = Runner.from_cfg(scripted(tmp_path, values))
    first.register_hook(Kill(*kill))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = scripted(tmp_path, values, resume=True, load_from=latest_checkpoint(tmp_path))
    again.experiment_name = f'{tmp_path.name}_again'
    resumed = Runner.from_cfg(again)
    resumed.train()
    best = tmp_path / 'best_mIoU_epoch_2.pth'
    assert list(tmp_path.glob('best_*')) == [best] and resumed.message_hub.get_info('best_score') == 70.0
    weights = [torch.load(tmp_path / name, weights_only=False)['state_dict'] for name in (best, 'epoch_2.pth')]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    'checkpoint, expected',
    [
        ({}, 'mmwsl.BestCheckpointHook'),
        (dict(save_best=None), 'CheckpointHook'),
        (dict(save_best='accuracy/top1'), 'CheckpointHook'),
        (dict(interval=-1), 'CheckpointHook'),
    ],
    ids=str,
)
def test_training_keeps_the_best_unless_the_config_says_what_it_keeps(checkpoint, expected):
    cfg = Config.fromfile(ROOT / 'configs/wsl_digits.py')
    cfg.merge_from_dict(dict(default_hooks=dict(checkpoint=checkpoint)))
    add_hooks(cfg)
    assert cfg.default_hooks.checkpoint.type == expected
    cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    add_hooks(cfg)
    assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'  # nothing to choose by
