"""Runs that train together: each comes out as tools/train.py makes it. What a GPU captures is shown on one alone."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmwsl.cache import TeacherLosses
from mmwsl.cache.fingerprint import training_set
from mmwsl.engine import runs
from mmwsl.engine.together import train_together
from mmwsl.engine.together.batches import Batches
from mmwsl.engine.together.config import check_config, put_on_device
from mmwsl.engine.together.member import Member, _Halves, saved
from mmwsl.engine.together.steps import Together
from mmwsl.models.teachers import FrozenTeacher
from mmwsl.registry import DATASETS
from tests.tiny import ROOT, build, digits_config, distillation, network, on_device, save_teacher


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp('teacher') / 'teacher.pth')


@pytest.fixture
def config(tmp_path, teacher):
    """Two epochs on the digits in batches of 170, and one of 90."""

    def made(name, alone=False, weighting='wsl', **kwargs):
        distiller = dict(
            type='mmwsl.WSLDistiller',
            distill_losses=dict(loss_kd=dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25, weighting=weighting)),
        )
        model = (
            network(2)
            if alone
            else distillation(teacher_ckpt=teacher, teacher_norm_eval=False, teacher_speed='plain', distiller=distiller)
        )
        cfg = digits_config(
            tmp_path / name,
            model,
            2,
            **on_device(
                custom_hooks=[dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.CheckTeacherHook', min_score=0)]
            ),
        )
        cfg.merge_from_dict({'train_dataloader.batch_size': 170, **kwargs})
        return cfg

    return made


def trained(*configs, tell=lambda line: None):
    """Train copies together; return the students' weights."""
    work_dirs = [Path(cfg.work_dir) for cfg in configs]
    train_together(copy.deepcopy(configs), work_dirs, tell)
    return [weights(work_dir) for work_dir in work_dirs]


def weights(work_dir):
    return torch.load(work_dir / 'epoch_2.pth', weights_only=False)['state_dict']


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize('schedule', ['cosine by steps', 'steps by epoch', 'warm-up'])
def test_each_run_comes_out_as_the_runner_makes_it(config, tmp_path, schedule):
    cosine = dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, eta_min=0.0)
    schedulers = {
        'cosine by steps': cosine,
        'steps by epoch': dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.1),
        'warm-up': [dict(type='LinearLR', by_epoch=False, start_factor=0.01, begin=0, end=5), cosine],
    }[schedule]
    configs = [config('wsl'), config('kd', weighting='one'), config('alone', alone=True)]
    if schedule != 'warm-up':
        configs = configs[:1]
    for cfg in configs:
        cfg.param_scheduler = schedulers
    found = trained(*configs)
    for cfg, ours in zip(configs, found, strict=True):
        log = runs.scalars(Path(cfg.work_dir))
        cfg.work_dir += '_runner'
        Runner.from_cfg(cfg).train()
        theirs = weights(Path(cfg.work_dir))
        assert_same(ours, theirs)
        [accuracy] = [
            line['accuracy/top1']
            for line in runs.scalars(Path(cfg.work_dir))
            if line['step'] == 2 and 'accuracy/top1' in line
        ]
        assert [line['accuracy/top1'] for line in log if 'accuracy/top1' in line][-1] == pytest.approx(accuracy)


def test_the_layout_of_weights_is_the_one_that_the_config_asks_for(config):
    cfg = config('alone', alone=True)
    cfg.model = network(16)
    cfg.custom_hooks.append(dict(type='mmwsl.ChannelsLastHook'))
    [ours] = trained(cfg)
    cfg.work_dir += '_runner'
    Runner.from_cfg(cfg).train()
    assert_same(ours, weights(Path(cfg.work_dir)))


def test_wrong_labels_folds_and_losses_by_image(config, tmp_path):
    """An image's L_t is found by its place in the whole training set, which is not its place in the fold."""
    cfg = config('run', weighting=dict(type='mmwsl.WSLWeighting', teacher_losses=str(tmp_path / 'losses.npz')))
    noise = dict(type='mmwsl.LabelNoise', prob=0.4, num_classes=10)
    digits = dict(type='mmwsl.Digits', split='train', pipeline=[noise, dict(type='PackInputs')])
    cfg.train_dataloader.dataset.dataset = dict(type='mmwsl.Fold', fold=1, folds=3, dataset=digits)
    labels, images = training_set(DATASETS.build(digits))
    losses = np.random.default_rng(0).uniform(0.1, 4, len(labels)).astype(np.float32)
    TeacherLosses(losses, labels, images, {'kind': 'out of fold'}).save(tmp_path / 'losses.npz')
    runner = copy.deepcopy(cfg)
    plain = copy.deepcopy(cfg)
    plain.work_dir += '_plain'
    plain.model.distiller.distill_losses.loss_kd.weighting = 'wsl'
    for each in (cfg, plain):
        each.train_dataloader.dataset = dict(type='mmwsl.SeededViews', dataset=each.train_dataloader.dataset.dataset)
    ours, other = trained(cfg, plain)
    runner.work_dir += '_runner'
    Runner.from_cfg(runner).train()
    assert_same(ours, weights(Path(runner.work_dir)))
    assert not torch.equal(ours['architecture.head.fc.weight'], other['architecture.head.fc.weight'])


def test_a_teacher_that_runs_share_is_asked_once_for_a_batch(config, monkeypatch):
    asked, ask = [], FrozenTeacher.__call__

    def spied(self, inputs, data_samples=None):
        asked.append(len(inputs))
        return ask(self, inputs, data_samples)

    monkeypatch.setattr(FrozenTeacher, '__call__', spied)
    other = config('other')
    other.model.teacher_norm_eval = True
    trained(config('wsl'), config('kd', weighting='one'), other, config('alone', alone=True))
    assert asked == 2 * [170, 170, 170, 170, 170, 170, 90, 90]


def test_runs_of_different_seeds_see_their_own_batches(config):
    first, second = config('first'), config('second')
    second.randomness.seed = 1
    together = trained(first, second)
    second.work_dir += '_alone'
    assert_same(trained(second)[0], together[1])
    assert not torch.equal(*(each['architecture.head.fc.weight'] for each in together))


def test_a_run_that_was_ended_goes_on_to_the_same_weights(config, tmp_path):
    whole, parts = config('whole'), config('parts')
    expected, told = trained(whole), []

    def kill(line):
        told.append(line)
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(parts, tell=kill)
    assert saved(tmp_path / 'parts') == [1]
    assert_same(trained(parts, tell=kill)[0], expected[0])
    assert [line.partition(':')[0] for line in told] == ['epoch 1/2 parts', 'epoch 2/2 parts']
    log = runs.scalars(tmp_path / 'parts')
    assert [line['step'] for line in log] == [4, 1, 8, 2]
    assert {'loss', 'student.loss', 'distill.loss_kd', 'distill.wsl_weight', 'lr', 'time'} <= log[0].keys()


def test_a_loss_that_is_not_finite_names_its_run(config):
    wild = config('wild')
    wild.optim_wrapper.optimizer.lr = 1e30
    with pytest.raises(RuntimeError, match='the loss of wild is (nan|inf) in epoch [12]: leave this run out'):
        trained(config('tame'), wild)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'optim_wrapper.clip_grad': dict(max_norm=1.0)}, 'optim_wrapper.clip_grad'),
        ({'optim_wrapper.accumulative_counts': 2}, 'optim_wrapper.accumulative_counts'),
        ({'optim_wrapper.type': 'AmpOptimWrapper'}, "optim_wrapper.type='AmpOptimWrapper'.*dtype='bfloat16'"),
        ({'optim_wrapper.optimizer.dampening': 0.1}, 'optim_wrapper.optimizer.dampening'),
        ({'model.teacher_cache': 'folder'}, 'model.teacher_cache'),
        ({'load_from': 'epoch_1.pth'}, 'load_from'),
        ({'compile': True}, 'compile'),
        ({'auto_scale_lr.enable': True}, 'auto_scale_lr.enable'),
        ({'val_evaluator.type': 'MultiLabelMetric'}, 'a val_evaluator other than Accuracy'),
        (
            {'train_cfg': dict(type='IterBasedTrainLoop', max_iters=3, _delete_=True)},
            'a train_cfg that is not by epoch',
        ),
        ({'custom_hooks': [dict(type='EMAHook')]}, "the hook 'EMAHook'"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_hold_is_refused(config, options, message):
    cfg = config('run')
    check_config(cfg)
    cfg.merge_from_dict(options)
    with pytest.raises(ValueError, match=f'cannot have {message}.*without --together'):
        check_config(cfg)


def test_what_a_model_does_on_the_host_is_refused(config):
    warming, mixing = config('warming'), config('mixing', alone=True)
    warming.model.distiller.distill_losses.loss_kd = dict(
        type='mmwsl.WeightedLoss', loss=dict(type='SoftCrossEntropy', tau=4.0), warmup_epochs=1
    )
    with pytest.raises(ValueError, match=r"cannot have warmup_epochs, as in \['loss_kd'\]"):
        trained(warming)
    mixing.model.train_cfg = dict(augments=dict(type='mmpretrain.Mixup', alpha=0.2))
    with pytest.raises(ValueError, match='cannot mix images'):
        trained(mixing)
    momentum = config('momentum')
    momentum.param_scheduler = dict(type='StepMomentum', by_epoch=True, step_size=1)
    with pytest.raises(ValueError, match='cannot schedule more than the learning rate'):
        trained(momentum)


def test_what_runs_have_in_common(config):
    first, longer, smaller = config('first'), config('longer'), config('smaller')
    longer.train_cfg.max_epochs = 3
    smaller.train_dataloader.batch_size = 50
    unseeded = config('unseeded')
    unseeded.randomness.seed = None
    for second, message in (
        (longer, r'the same train_cfg.max_epochs, got \[2, 3\]'),
        (smaller, 'the same train_dataloader'),
        (unseeded, 'need a seed'),
    ):
        with pytest.raises(ValueError, match=message):
            trained(first, second)


def test_images_that_are_cropped_and_flipped_come_to_stay_on_the_device():
    cfg = Config.fromfile(ROOT / 'configs/kd_r56_r20_cifar100.py')
    expected = Config.fromfile(ROOT / 'configs/wsl_r56_r20_cifar100_device.py')
    put_on_device(cfg)
    for split in ('train', 'val'):
        key = f'{split}_dataloader'
        assert cfg[key].dataset == expected[key].dataset and cfg[key].collate_fn == expected[key].collate_fn
    before = copy.deepcopy(expected.train_dataloader)
    put_on_device(expected)
    assert expected.train_dataloader == before
    cfg = Config.fromfile(ROOT / 'configs/wsl_r34_r18_in1k.py')
    with pytest.raises(ValueError, match='train_dataloader has .* in its pipeline.*only padded, cropped and flipped'):
        put_on_device(cfg)


def test_halved_weights_give_what_autocast_gives():
    model = build(network(4)).train()
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    halved = copy.deepcopy(model)
    halves = _Halves(halved)

    def loss_of(network):
        with torch.autocast('cpu', torch.bfloat16):
            return network(images).float().logsumexp(1).mean()

    expected = loss_of(model)
    expected.backward()
    with halves:
        found = loss_of(halved)
        found.backward()
    halves.give_gradients()
    assert found == expected and halved.head.fc.weight.dtype == torch.float32
    for ours, theirs in zip(halved.parameters(), model.parameters(), strict=True):
        assert theirs.grad.any() and torch.equal(ours.grad, theirs.grad)


def test_an_epoch_may_be_shorter_than_the_steps_before_a_graph_is_captured(config, tmp_path):
    init_default_scope('mmpretrain')
    cfg = config('alone', alone=True)
    batches = Batches(Runner.build_dataloader(cfg.train_dataloader, seed=0))
    together = Together([Member(cfg, tmp_path, 4, torch.device('cpu'))], {0: batches})
    batches.begin(batches.drawn(0))
    for size in (170, 90):  # 3 steps of each take 780 images, and there are 600: a GPU fails there for good
        together.warm_up(size)
    assert together.members[0].step_number == 6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_graphs_train_as_eager_steps_do(config, tmp_path):
    init_default_scope('mmpretrain')
    deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)

    def made():
        configs = [config('wsl'), config('kd', weighting='one'), config('alone', alone=True)]
        loader = Runner.build_dataloader(configs[0].train_dataloader, seed=0)
        batches = {0: Batches(loader)}
        return Together([Member(cfg, tmp_path, 4, torch.device('cuda')) for cfg in configs], batches)

    with deterministic:
        captured, eager = made(), made()
        drawn = {0: captured.batches[0].drawn(0)}
        captured.capture(drawn)
        captured.train_epoch(drawn)
        eager.train_epoch(drawn)
        torch.cuda.synchronize()
    for ours, theirs in zip(captured.members, eager.members, strict=True):
        assert ours.step_number == theirs.step_number == 4
        for found, expected in zip(ours.state(), theirs.state(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
