"""Runs that end in an exception, are resumed, and are compared with unbroken ones."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from mmwsl.engine import latest_checkpoint, runs
from mmwsl.engine.hooks import exact_resume_hook
from tests.tiny import digits_config, network

pytestmark = pytest.mark.usefixtures('plain_configs')
HOOKS = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.ExactResumeHook')]
EPOCHS = 3  # of 6 iterations


class Kill(Hook):
    """Ends a run at a moment of an epoch, before any other hook sees it."""

    priority = 'HIGHEST'

    def __init__(self, moment, epoch):
        self.moment, self.epoch = moment, epoch

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (self.moment, self.epoch) == ('train', runner.epoch + 1) and batch_idx == 3:
            raise KeyboardInterrupt
        if (self.moment, self.epoch) == ('iter', runner.iter + 1):
            raise KeyboardInterrupt

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (self.moment, self.epoch) == ('val', runner.epoch):
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def callers_generators():
    """The hook of the epochs' seeds seeds the process; give the other tests their generators back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def run(work_dir, kill=None, resume=None, name='', **settings):
    cfg = digits_config(work_dir, network(2), EPOCHS, **copy.deepcopy({**dict(custom_hooks=HOOKS), **settings}))
    cfg.merge_from_dict(
        dict(resume=resume is not None, load_from=resume, experiment_name=f'{work_dir}{name}{resume}'.replace('/', '_'))
    )
    runner = Runner.from_cfg(cfg)
    if kill:
        runner.register_hook(Kill(*kill))
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    else:
        runner.train()
    return runner


def log(work_dir):
    return max(work_dir.glob('*/*.log'), key=lambda path: path.stat().st_mtime_ns).read_text()


def accuracies(work_dir):
    return {line['step']: line['accuracy/top1'] for line in runs.scalars(work_dir) if 'epoch' not in line}


PLATEAU = dict(type='ReduceOnPlateauLR', monitor='accuracy/top1', rule='greater', patience=0, threshold=1000.0)
CASES = {
    'accumulated gradients': dict(optim_wrapper=dict(accumulative_counts=4)),
    'rate that follows the metric': dict(param_scheduler=[PLATEAU]),
    'best checkpoint': dict(default_hooks=dict(checkpoint=dict(save_best='accuracy/top1'), logger=dict(interval=1))),
    'by iterations': dict(  # validated after 8 and 16, and saved after 4, 8, 12 and 16
        train_cfg=dict(by_epoch=False, max_iters=16, val_interval=8, _delete_=True),
        train_dataloader=dict(sampler=dict(type='mmwsl.InfiniteViewSampler', shuffle=True)),
        param_scheduler=None,
        optim_wrapper=dict(accumulative_counts=3),
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=4), logger=dict(interval=1)),
    ),
    'early stopping': dict(
        custom_hooks=[
            *HOOKS,
            dict(type='EarlyStoppingHook', monitor='accuracy/top1', rule='greater', min_delta=1000.0, patience=1),
        ]
    ),  # stops after two epochs
}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Each case's run without a kill, made once."""
    made = {}

    def of(case):
        if case not in made:
            folder = tmp_path_factory.mktemp('unbroken')
            made[case] = run(folder, **CASES[case]), accuracies(folder)
        return made[case]

    return of


@pytest.mark.parametrize(
    'case, kill',
    [
        *((case, kill) for case in CASES if case != 'by iterations' for kill in (('train', 2), ('val', 2))),
        ('by iterations', ('iter', 14)),
        ('by iterations', ('val', 0)),  # from 12; from 8, before it was validated
        ('rate that follows the metric', ('val', EPOCHS)),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_very_weights(tmp_path, unbroken, case, kill):
    expected, validated = unbroken(case)
    run(tmp_path, kill, **CASES[case])
    resumed = run(tmp_path, resume=latest_checkpoint(tmp_path), **CASES[case])
    assert resumed.epoch == expected.epoch == {'early stopping': 2, 'by iterations': 0}.get(case, EPOCHS)
    torch.testing.assert_close(resumed.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optim_wrapper.state_dict(), expected.optim_wrapper.state_dict(), rtol=0, atol=0)
    assert accuracies(tmp_path) == validated
    best = expected.message_hub.runtime_info.get('best_score')
    assert resumed.message_hub.runtime_info.get('best_score') == best and (best is None) == (case != 'best checkpoint')
    assert 'weights of an unbroken' not in log(tmp_path)


def test_an_epoch_whose_checkpoint_was_saved_after_its_validation_is_not_validated_again(tmp_path):
    run(tmp_path, ('train', 2), **CASES['best checkpoint'])  # the first epoch is the best so far
    run(tmp_path, resume=latest_checkpoint(tmp_path), **CASES['best checkpoint'])
    assert 'Epoch(val) [1]' not in log(tmp_path) and 'Epoch(val) [2]' in log(tmp_path)


NO_VIEWS = dict(
    dataset=dict(type='mmwsl.Digits', split='train', pipeline=[dict(type='PackInputs')], _delete_=True),
    sampler=dict(type='DefaultSampler', shuffle=True),
)


@pytest.mark.parametrize(
    'settings, checkpoint, reason',
    [
        (
            dict(
                default_hooks=dict(checkpoint=dict(by_epoch=False, interval=5), logger=dict(interval=1)),
                train_dataloader=NO_VIEWS,
            ),
            'iter_5.pth',
            'its checkpoint has 5 iterations and 0 epochs, and an epoch has 6, so epoch 1 begins again',
        ),
        (
            dict(
                train_cfg=dict(by_epoch=False, max_iters=10, val_interval=10, _delete_=True),
                param_scheduler=None,
                default_hooks=dict(checkpoint=dict(by_epoch=False), logger=dict(interval=1)),
                train_dataloader=dict(sampler=dict(type='InfiniteSampler', shuffle=True)),
            ),
            None,
            'augmentations, if there are any, draw other numbers. Put mmwsl.SeededViews around the dataset, with '
            "sampler=dict(type='mmwsl.InfiniteViewSampler', shuffle=True)",
        ),
        (CASES['best checkpoint'], 'best', "its checkpoint does not hold the optimiser's state, as best_*.pth do not"),
        (dict(custom_hooks=HOOKS[1:]), None, 'dropout and mixup, if there are any, draw other numbers'),
        (dict(train_dataloader=NO_VIEWS), None, 'augmentations, if there are any, draw other numbers'),
    ],
    ids=['within an epoch', 'by iterations', 'best', 'no seed', 'no views'],
)
def test_a_resume_that_is_not_exact_says_why(tmp_path, settings, checkpoint, reason):
    run(tmp_path, None if 'train_cfg' in settings else ('train', 2), **settings)
    found = next(tmp_path.glob(f'{checkpoint}*'), None) if checkpoint else None
    run(tmp_path, resume=str(found) if found else latest_checkpoint(tmp_path), name='resumed', **settings)
    assert f'will not end with exactly the weights of an unbroken one: {reason}' in log(tmp_path)


def test_gradients_that_are_lost_are_said(tmp_path):
    settings = dict(CASES['accumulated gradients'], custom_hooks=HOOKS[:1])  # saved without the hook
    run(tmp_path, ('train', 2), **settings)
    run(tmp_path, resume=latest_checkpoint(tmp_path), **CASES['accumulated gradients'])
    assert 'gradients that were accumulated when it was saved are not in the checkpoint' in log(tmp_path)


@pytest.mark.parametrize('steps, pending', [((2, 0), False), ((2, 3), True), ((1, 0), True)])
def test_gradients_of_each_of_several_optimizers_count(steps, pending):
    """As in MMRazor's data-free distillation: one for the student, one for the generator."""
    wrappers = {}
    for name, count in zip(('architecture', 'generator'), steps):
        wrappers[name] = OptimWrapper(
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), accumulative_counts=2
        )
        wrappers[name]._inner_count = count
    runner = SimpleNamespace(optim_wrapper=OptimWrapperDict(**wrappers))
    assert exact_resume_hook.is_pending(runner) is pending
