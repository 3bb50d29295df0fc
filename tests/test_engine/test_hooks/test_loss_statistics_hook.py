import json
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, LogProcessor, Runner
from torch import nn

from mmwsl.engine import add_hooks
from mmwsl.engine.hooks import LossStatisticsHook
from mmwsl.functional import wsl_weight
from mmwsl.models.losses import Call
from tests.tiny import ROOT, digits_config, distillation

HOOK = dict(type='mmwsl.LossStatisticsHook')
ALWAYS = [
    dict(type=f'mmwsl.{name}')
    for name in (
        'CheckResumeHook',
        'StopOnSignalHook',
        'ExactResumeHook',
        'FiniteLossHook',
        'RunReportHook',
        'ProgressHook',
    )
]
OF_TEACHERS = [dict(type='mmwsl.HardLossHook')]
# the log processor means what matches, here statistics as well: so it looks back over its window
MEANS = dict(type='LogProcessor', window_size=10, mean_pattern=r'.*(loss|wsl_weight).*')


@pytest.fixture
def computed(monkeypatch):
    """The calls of which statistics were computed, by their number."""
    numbers, kept, init, statistics = [], {}, Call.__init__, Call.statistics

    def counting(call, *args):
        init(call, *args)
        kept[id(call)] = kept['all'] = kept.get('all', 0) + 1

    def listening(call):
        numbers.append(kept[id(call)])
        return statistics(call)

    monkeypatch.setattr(Call, '__init__', counting)
    monkeypatch.setattr(Call, 'statistics', listening)
    return numbers


def logged(work_dir, hooks, interval):
    """Run the digits in 20 steps an epoch; returns what is logged, without what a clock says."""
    cfg = digits_config(
        work_dir,
        distillation(),
        2,
        custom_hooks=[dict(type='mmwsl.EpochSeedHook'), *hooks],
        train_dataloader=dict(batch_size=30),
        log_processor=MEANS,
        default_hooks=dict(logger=dict(interval=interval), checkpoint=dict(interval=-1)),
    )
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    Runner.from_cfg(cfg).train()
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if 'time' not in key} for line in lines]


@pytest.mark.parametrize(
    ('interval', 'steps', 'needed'),
    [
        (3, [3, 6, 9, 12, 15, 18, 23, 26, 29, 32, 35, 38], [*range(1, 41)]),  # the last two for a log that never came
        (13, [13, 33], [*range(4, 14), *range(24, 34)]),
        (100, [20, 40], [*range(11, 21), *range(31, 41)]),
    ],
)  # an epoch that is shorter is logged at its end
def test_what_is_logged_is_the_same_and_no_other_step_computes_it(tmp_path, computed, interval, steps, needed):
    expected = logged(tmp_path / 'without', [], interval)
    assert computed == [*range(1, 41)]
    computed.clear()
    found = logged(tmp_path / 'with', [HOOK], interval)
    assert found == expected and [line['step'] for line in found] == steps
    assert all('distill.wsl_weight_p50' in line and 'distill.regularization_share' in line for line in found)
    assert [number - 40 for number in computed] == needed


@pytest.mark.parametrize('by_epoch', [True, False])
def test_steps_to_the_loggers_turn_are_those_of_the_logger(by_epoch):
    for steps in (1, 6, 10, 12):
        for interval in (1, 4, 6, 12, 15):
            for ignore_last in (True, False):
                logger, loader = LoggerHook(interval=interval, ignore_last=ignore_last), range(steps)
                places = [place for _ in range(30) for place in range(steps)] if by_epoch else list(range(60))
                turns = [
                    number
                    for number, place in enumerate(places)
                    if logger.every_n_inner_iters(place, interval)
                    or (logger.end_of_epoch(loader, place) and (not ignore_last or steps <= interval))
                ]
                hook = LossStatisticsHook()
                hook.logger, hook.by_epoch = logger, by_epoch
                runner = SimpleNamespace(train_dataloader=loader)
                for number, place in enumerate(places[: turns[-1]]):
                    expected = min(turn for turn in turns if turn >= number) - number
                    assert hook._steps_to_go(runner, place) == expected, (steps, interval, ignore_last, number)


@pytest.mark.parametrize(
    'changed',
    [
        dict(
            log_processor=dict(
                custom_cfg=[dict(data_src='distill.wsl_weight', window_size='epoch', method_name='mean')]
            )
        ),
        dict(default_hooks=dict(logger=None)),
    ],
)
def test_what_may_look_further_back_is_given_everything(tmp_path, computed, changed):
    cfg = digits_config(tmp_path, distillation(), custom_hooks=[HOOK])
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.merge_from_dict(dict(log_processor=MEANS, default_hooks=dict(logger=dict(interval=100))))
    cfg.merge_from_dict(changed)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert computed == list(range(1, 7))
    assert runner.model.distiller.logs_statistics  # as it was before


@pytest.mark.parametrize(('loop', 'by_epoch'), [(EpochBasedTrainLoop, True), (IterBasedTrainLoop, False)])
def test_a_run_by_iterations_is_told_apart(loop, by_epoch):
    hook = LossStatisticsHook()
    hook.before_train(
        SimpleNamespace(
            model=nn.Identity(), hooks=[LoggerHook()], train_loop=object.__new__(loop), log_processor=LogProcessor()
        )
    )
    assert hook.by_epoch == by_epoch and not hook.everything


def test_train_adds_the_hook_to_a_distillation_that_has_none():
    cfg = Config.fromfile(ROOT / 'configs/wsl_digits.py')
    before = list(cfg.custom_hooks)
    for _ in range(2):
        add_hooks(cfg)
        assert cfg.custom_hooks == [*before, *ALWAYS, HOOK, *OF_TEACHERS]
    alone = Config.fromfile(ROOT / 'configs/vanilla/digits_student.py')
    add_hooks(alone)
    assert alone.custom_hooks == [*before, *ALWAYS]
    own = Config(dict(model=dict(distiller=dict(type='mmwsl.WSLDistiller'))))
    add_hooks(own)
    # without CheckTeacherHook
    assert own.custom_hooks == [dict(type='mmwsl.CheckLabelsHook'), *ALWAYS, HOOK, *OF_TEACHERS]


def test_weights_in_a_distiller_of_mmrazor_are_logged(tmp_path):
    """Two losses, of the same logits: the statistics of the second have its position in their names."""
    mapping = dict(
        preds_S=dict(recorder='labels', from_student=True, data_idx=0),
        preds_T=dict(recorder='logits', from_student=False),
        gt_labels=dict(recorder='labels', from_student=True, data_idx=1),
    )
    model = dict(
        distillation(),
        type='mmrazor.SingleTeacherDistill',
        _scope_='mmrazor',
        distiller=dict(
            type='ConfigurableDistiller',
            distill_losses=dict(
                loss_wsl=dict(type='mmwsl.WSLLoss'),
                loss_one=dict(type='mmwsl.WSLLoss', weighting='one'),
                loss_kl=dict(type='KLDivergence'),
            ),
            student_recorders=dict(labels=dict(type='ModuleInputs', source='head.loss_module')),
            teacher_recorders=dict(logits=dict(type='ModuleOutputs', source='head')),
            loss_forward_mappings=dict(loss_wsl=mapping, loss_one=mapping),
        ),
    )
    cfg = digits_config(tmp_path, model, custom_hooks=[HOOK], default_hooks=dict(logger=dict(interval=1)))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner, expected = Runner.from_cfg(cfg), []
    runner.model.distiller.distill_losses['loss_wsl'].register_forward_hook(
        lambda _, __, arguments, ___: expected.append(
            wsl_weight(arguments['preds_S'], arguments['preds_T'], arguments['gt_labels']).mean().item()
        ),
        with_kwargs=True,
    )
    runner.train()
    lines = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line['distill.wsl_weight'] for line in found] == pytest.approx(expected, rel=1e-5) and len(expected) > 5
    assert {line['distill.wsl_weight_2'] for line in found} == {1.0}
    assert all(0 <= line['distill.regularization_share'] <= 1 for line in found)
    assert all(
        abs(line['loss'] - line['student.loss'] - line['distill.loss_wsl'] - line['distill.loss_one']) < 1e-4
        for line in found
    )  # what is logged is not summed
