import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner, get_priority

from mmwsl.engine.hooks import epoch_seed_hook
from mmwsl.engine.hooks.epoch_seed_hook import EpochSeedHook
from tests.caches import PIPELINE
from tests.tiny import PREPROCESSOR, digits_config, distillation, on_device, save_teacher


@pytest.fixture(autouse=True)
def callers_generators():
    """The hook seeds the process it runs in; give the other tests their generators back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def runner_with(seed=5, epoch=2, sampler=None, iter=0, **randomness):
    return SimpleNamespace(
        seed=seed, epoch=epoch, iter=iter, _randomness_cfg=randomness,
        train_dataloader=SimpleNamespace(batch_sampler=SimpleNamespace(sampler=sampler or SimpleNamespace(seed=0)),
                                         sampler=None))


@pytest.fixture
def draws(monkeypatch):
    """What each generator gives after the hook."""
    def after(seed=5, epoch=2, rank=0, iter=0):
        monkeypatch.setattr(epoch_seed_hook, 'get_rank', lambda: rank)
        EpochSeedHook().before_train_epoch(runner_with(seed, epoch, iter=iter))
        return random.random(), np.random.rand(), torch.rand(()).item()
    return after


def test_draws_repeat_whatever_was_drawn_before(draws):
    wanted = draws()
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert draws() == wanted


@pytest.mark.parametrize('change', [dict(seed=6), dict(epoch=3), dict(rank=1), dict(seed=2, epoch=5),
                                    dict(epoch=0, rank=2)], ids=str)
def test_seed_epoch_and_rank_change_the_draws_of_each_generator(draws, change):
    for a, b in zip(draws(), draws(**change)):
        assert a != b


def test_a_run_by_iterations_does_not_begin_anew_where_it_is_resumed(draws):
    assert draws(epoch=0, iter=40) != draws(epoch=0)
    assert draws(epoch=2, iter=40) == draws(epoch=2)


def test_the_sampler_follows_the_seed_of_the_run():
    runner = runner_with(seed=5, sampler=SimpleNamespace(seed=123))
    EpochSeedHook().before_train_epoch(runner)
    assert runner.train_dataloader.batch_sampler.sampler.seed == 5


def test_the_sampler_keeps_its_seed_where_ranks_have_their_own():
    runner = runner_with(seed=5, sampler=SimpleNamespace(seed=123), diff_rank_seed=True)
    EpochSeedHook().before_train_epoch(runner)
    assert runner.train_dataloader.batch_sampler.sampler.seed == 123  # the ranks must share one to share out the images


@pytest.mark.parametrize('sampler', [torch.utils.data.SequentialSampler([0]), SimpleNamespace(seed=None)])
def test_a_sampler_without_a_seed_gets_none(sampler):
    EpochSeedHook().before_train_epoch(runner_with(sampler=sampler))
    assert getattr(sampler, 'seed', None) is None


def test_comes_before_hooks_of_normal_priority():
    hook = HOOKS.build(dict(type='mmwsl.EpochSeedHook'))
    assert type(hook) is EpochSeedHook
    assert get_priority(hook.priority) < get_priority('NORMAL')  # a lower number is called earlier


def test_loader_without_a_sampler_is_no_obstacle():
    runner = runner_with()
    del runner.train_dataloader.batch_sampler
    EpochSeedHook().before_train_epoch(runner)


AUGMENTED = dict(
    views=dict(dataset=dict(dataset=dict(pipeline=PIPELINE))),
    device=on_device()['train_dataloader'])
AUGMENTED['device']['dataset'].update(padding=1, flip_prob=0.5)


@pytest.mark.parametrize('loader', AUGMENTED)
def test_a_resumed_run_ends_with_the_very_weights_of_an_unbroken_one(tmp_path, loader):
    """With random views and mixup, and from another state of the generators."""
    mixing = dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8)])
    model = distillation(teacher_ckpt=save_teacher(tmp_path / 'teacher.pth'),
                         data_preprocessor=dict(PREPROCESSOR, batch_augments=mixing))

    def weights(name, **kwargs):
        runner = Runner.from_cfg(digits_config(
            tmp_path / name, model, 2, custom_hooks=[dict(type='mmwsl.EpochSeedHook')], val_cfg=None,
            val_dataloader=None, val_evaluator=None, train_dataloader=AUGMENTED[loader], **kwargs))
        runner.train()
        return runner.model.state_dict()
    unbroken = weights('unbroken')
    shutil.copytree(tmp_path / 'unbroken', tmp_path / 'resumed', ignore=shutil.ignore_patterns('epoch_2.pth'))
    (tmp_path / 'resumed/last_checkpoint').write_text(str(tmp_path / 'resumed/epoch_1.pth'))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    torch.testing.assert_close(weights('resumed', resume=True), unbroken, rtol=0, atol=0)
