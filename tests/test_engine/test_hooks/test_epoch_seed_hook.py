import copy
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, get_priority

from mmwsl.datasets import SeededViews
from mmwsl.engine import runners
from mmwsl.engine.hooks import epoch_seed_hook
from mmwsl.engine.hooks.epoch_seed_hook import EpochSeedHook
from tests.caches import PIPELINE
from tests.tiny import PREPROCESSOR, digits_config, distillation, network, on_device, save_teacher


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
        seed=seed,
        epoch=epoch,
        iter=iter,
        _randomness_cfg=randomness,
        train_loop=None,
        train_dataloader=SimpleNamespace(
            batch_sampler=SimpleNamespace(sampler=sampler or SimpleNamespace(seed=0)), sampler=None
        ),
    )


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


@pytest.mark.parametrize(
    'change', [dict(seed=6), dict(epoch=3), dict(rank=1), dict(seed=2, epoch=5), dict(epoch=0, rank=2)], ids=str
)
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


AUGMENTED = dict(views=dict(dataset=dict(dataset=dict(pipeline=PIPELINE))), device=on_device()['train_dataloader'])
AUGMENTED['device']['dataset'].update(padding=1, flip_prob=0.5)


@pytest.mark.parametrize('loader', AUGMENTED)
def test_a_resumed_run_ends_with_the_very_weights_of_an_unbroken_one(tmp_path, loader):
    """With random views and mixup, and from another state of the generators."""
    mixing = dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8)])
    model = distillation(
        teacher_ckpt=save_teacher(tmp_path / 'teacher.pth'), data_preprocessor=dict(PREPROCESSOR, batch_augments=mixing)
    )

    def weights(name, **kwargs):
        runner = Runner.from_cfg(
            digits_config(
                tmp_path / name,
                model,
                2,
                custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
                val_cfg=None,
                val_dataloader=None,
                val_evaluator=None,
                train_dataloader=AUGMENTED[loader],
                **kwargs,
            )
        )
        runner.train()
        return runner.model.state_dict()

    unbroken = weights('unbroken')
    shutil.copytree(tmp_path / 'unbroken', tmp_path / 'resumed', ignore=shutil.ignore_patterns('epoch_2.pth'))
    (tmp_path / 'resumed/last_checkpoint').write_text(str(tmp_path / 'resumed/epoch_1.pth'))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    torch.testing.assert_close(weights('resumed', resume=True), unbroken, rtol=0, atol=0)


def by_iterations(work_dir, model, max_iters=10, loader=None, **kwargs):
    """Config of a run that is saved every 4 iterations; 6 are an epoch of the data. It is not validated."""
    loader = dict(
        copy.deepcopy(loader or {}), sampler=dict(type='mmwsl.InfiniteViewSampler', shuffle=True, _delete_=True)
    )
    cfg = digits_config(
        work_dir,
        model,
        custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=max_iters, _delete_=True),
        param_scheduler=None,
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=4), logger=dict(interval=1)),
        **kwargs,
    )
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return cfg


class Spy(Hook):
    """Keeps the images of each step, and ends the run in one of them."""

    def __init__(self, ends_in=None):
        self.ends_in, self.seen = ends_in, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append([sample.sample_idx for sample in data_batch['data_samples']])
        if batch_idx + 1 == self.ends_in:
            raise KeyboardInterrupt


@pytest.mark.parametrize('loader', AUGMENTED)
def test_a_run_by_iterations_ends_with_the_very_weights_of_an_unbroken_one(tmp_path, loader):
    """With random views and mixup, and without a seed in the config of the run that is killed."""
    mixing = dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8)])
    model = distillation(
        teacher_ckpt=save_teacher(tmp_path / 'teacher.pth'), data_preprocessor=dict(PREPROCESSOR, batch_augments=mixing)
    )

    def train(name, spy, seed=None, **kwargs):
        runner = Runner.from_cfg(
            by_iterations(tmp_path / name, model, loader=AUGMENTED[loader], randomness=dict(seed=seed), **kwargs)
        )
        runner.register_hook(spy)
        runner.train()
        return runner

    unbroken, killed, resumed = Spy(), Spy(ends_in=7), Spy()
    with pytest.raises(KeyboardInterrupt):
        train('killed', killed)
    seed = torch.load(tmp_path / 'killed/iter_4.pth', weights_only=False)['meta']['seed']
    expected = train('unbroken', unbroken, seed)
    found = train('killed', resumed, resume=True, experiment_name='resumed')
    assert killed.seen == unbroken.seen[:7] and resumed.seen == unbroken.seen[4:]
    assert len({image for step in unbroken.seen[:6] for image in step}) == 600
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)


def test_a_resumed_run_by_iterations_loads_only_what_it_trains_with(tmp_path, monkeypatch):
    loaded = []
    draw = SeededViews.__getitem__
    monkeypatch.setattr(SeededViews, '__getitem__', lambda data, view: loaded.append(view) or draw(data, view))
    Runner.from_cfg(by_iterations(tmp_path, network(2), 4)).train()
    loaded.clear()
    Runner.from_cfg(by_iterations(tmp_path, network(2), 6, resume=True, experiment_name='resumed')).train()
    assert len(loaded) == 200


def test_each_iteration_is_seeded(monkeypatch):
    monkeypatch.setattr(runners, 'IterBasedTrainLoop', SimpleNamespace)

    def drawn(**kwargs):
        runner = runner_with(**kwargs)
        runner.train_loop = SimpleNamespace()
        EpochSeedHook().before_train_iter(runner, 0)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert drawn(epoch=0, iter=3) == drawn(epoch=0, iter=3)
    for a, b in zip(drawn(epoch=0, iter=3), drawn(epoch=0, iter=4)):
        assert a != b
