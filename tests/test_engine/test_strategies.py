import importlib.util
import os
import signal
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from torch import distributed, nn

from mmwsl.engine import choose_strategy, prepare_strategy
from mmwsl.engine.strategies import CHOICES
from mmwsl.utils import sharding
from mmwsl.utils.checkpoint import unwrapped_model
from mmwsl.utils.sharding import shard_units
from tests.tiny import ROOT, batch, build, distillation, load_tool, network, save_teacher

STUDENT = 29  # tensors of the student, none of which is a buffer
CONFIG = """
_base_ = '{root}/configs/wsl_digits.py'
model = dict(
    teacher=dict(_delete_=True, **{teacher}), teacher_ckpt='{folder}/teacher.pth', teacher_norm_eval=True,
    # without BatchNorm, which would see other batches
    architecture=dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=1))))
optim_wrapper = dict(accumulative_counts=2, clip_grad={clip})
train_cfg = dict(max_epochs=2, val_interval=2)
train_dataloader = dict(batch_size={batch}, dataset=dict(dataset=dict(indices=100)))  # the last batch is smaller
val_dataloader = dict(batch_size=800, sampler=dict(round_up=False))
randomness = dict(seed=3)
custom_hooks = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.CheckTeacherHook', min_score=0)] + {hooks}
"""
SPIED: dict[str, Any] = {}
SHARDED = {'fsdp': False, 'fsdp2': True}  # and whether it clips gradients
if importlib.util.find_spec('deepspeed'):
    SHARDED['deepspeed'] = True


_AMP = 'optim_wrapper.type=BFloat16OptimWrapper'
_SPLIT_TEACHER = 'model.teacher_sharding=True'
SPLIT = {  # runs with teachers in shards, and in bfloat16 one with a whole one, with their options
    'ddp_split': ('--cfg-options', _SPLIT_TEACHER),
    'fsdp_split': ('--cfg-options', _SPLIT_TEACHER, '--strategy', 'fsdp'),
    'fsdp2_split': ('--cfg-options', _SPLIT_TEACHER, 'strategy.min_num_params=2000', '--strategy', 'fsdp2'),
    'amp_ddp': ('--cfg-options', 'model.teacher_speed=plain', _AMP),
    'amp_fsdp2_split': ('--cfg-options', _SPLIT_TEACHER, _AMP, 'strategy.min_num_params=2000', '--strategy', 'fsdp2'),
}


@HOOKS.register_module()
class StopFirstHook(Hook):
    """Sends a signal to one of two processes, where a gradient is pending."""

    priority = 'HIGHEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.iter == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@HOOKS.register_module()
class SpyOnBucketsHook(Hook):
    """Counts what DistributedDataParallel sends, and sends it."""

    def before_train(self, runner):
        SPIED.update(
            syncs=[],
            parameters=sum(parameter.numel() for parameter in runner.model.parameters()),
            unused=runner.model.find_unused_parameters,
        )

        def send(_, bucket):
            SPIED['syncs'].append((runner.iter, bucket.buffer().numel()))
            buffer = bucket.buffer().div_(distributed.get_world_size())
            sent = distributed.all_reduce(buffer, async_op=True).get_future()
            return sent.then(lambda done: done.value()[0])

        runner.model.register_comm_hook(None, send)


@HOOKS.register_module()
class LookAtTeacherHook(Hook):
    """Notes the loss of each step, and how many of the teacher's parameters this process holds after the last one."""

    def before_train(self, runner):
        SPIED['losses'] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        SPIED['losses'].append(float(outputs['loss']))

    def after_train(self, runner):
        parameters = list(unwrapped_model(runner.model).teacher.parameters())
        SPIED['whole'] = sum(parameter.numel() for parameter in parameters)
        SPIED['held'] = sum(getattr(parameter, '_local_tensor', parameter).numel() for parameter in parameters)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """What mmengine's AmpOptimWrapper, which needs a GPU, does to a pass, in bfloat16 on a CPU."""

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def config(folder, name, batch, clip=None, hooks=()):
    path = folder / f'{name}.py'
    path.write_text(
        CONFIG.format(root=ROOT, folder=folder, batch=batch, clip=clip, hooks=list(hooks), teacher=network(4))
    )
    return str(path)


def weights(folder, name, epoch=2):
    path, key = folder / name / f'epoch_{epoch}.pth', 'state_dict'
    if path.is_dir():  # DeepSpeed's
        path, key = path / 'mp_rank_00_model_states.pt', 'module'
    return torch.load(path, weights_only=False)[key]


def _train_on_two(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    main = load_tool('train').main

    def train(name, path, *options):
        store = f'file://{folder}/store_{name}{len(options)}'
        distributed.init_process_group('gloo', store, rank=rank, world_size=2)
        main([path, '--work-dir', str(folder / name), '--launcher', 'pytorch', *options])

    clip = dict(max_norm=0.05)
    spies = [dict(type='SpyOnBucketsHook'), dict(type='LookAtTeacherHook')]
    train('ddp', config(folder, 'ddp_of_two', 14, hooks=spies))
    torch.save(SPIED, folder / f'ddp_{rank}.pt')
    stopping = [dict(type='mmwsl.StopOnSignalHook', interval=1)]
    stopped = config(folder, 'stopped_of_two', 14, hooks=[dict(type='StopFirstHook'), *stopping])
    try:
        train('stopped', stopped)
    except SystemExit as ended:
        (folder / f'status_{rank}').write_text(str(ended.code))
    distributed.destroy_process_group()
    train('stopped', config(folder, 'resumed_of_two', 14, hooks=stopping), '--resume')
    for name, clipped in SHARDED.items():
        path = config(folder, f'{name}_of_two', 14, clip if clipped else None)
        options = ('--strategy', name)
        options += {
            'fsdp2': ('--cfg-options', 'strategy.min_num_params=2000'),
            'deepspeed': ('--cfg-options', 'strategy.zero_optimization.stage=1'),
        }.get(name, ())
        train(name, path, *options)
        if name != 'deepspeed':  # mmengine registers its optimisers each time, and a name can be registered once
            train(f'{name}_resumed', path, '--resume', str(folder / name / 'epoch_1.pth'), *options)
    sharding.LEAST = 200  # of a teacher with 1,000 parameters or so
    for name, options in SPLIT.items():
        path = config(folder, f'{name}_of_two', 14, hooks=[dict(type='LookAtTeacherHook')])
        train(name, path, *options)
        torch.save(SPIED, folder / f'{name}_{rank}.pt')


@pytest.mark.skipif(torch.cuda.is_available(), reason='two processes on a CPU')
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path, plain_configs):
    save_teacher(tmp_path / 'teacher.pth')
    main = load_tool('train').main
    for name, clip in (('one', None), ('one_clipped', dict(max_norm=0.05))):
        main([config(tmp_path, name, 28, clip), '--work-dir', str(tmp_path / name)])
    assert weights(tmp_path, 'one').keys() != {} and any(
        not torch.equal(value, weights(tmp_path, 'one_clipped')[key]) for key, value in weights(tmp_path, 'one').items()
    )  # it does clip
    torch.multiprocessing.start_processes(_train_on_two, (tmp_path,), nprocs=2, start_method='fork')
    for name, clipped in {'ddp': False, **SHARDED}.items():
        reference = 'one_clipped' if clipped else 'one'
        assert len(weights(tmp_path, name)) == STUDENT and all('architecture' in key for key in weights(tmp_path, name))
        torch.testing.assert_close(
            dict(weights(tmp_path, name)), dict(weights(tmp_path, reference)), rtol=1e-5, atol=1e-5
        )
    # the signal came to the second process in step 4, whose gradient waits for that of step 5
    assert [(tmp_path / f'status_{rank}').read_text() for rank in range(2)] == ['143', '143']
    meta = torch.load(tmp_path / 'stopped/interrupted.pth', weights_only=False)['meta']
    assert (meta['epoch'], meta['iter']) == (1, 6)
    torch.testing.assert_close(weights(tmp_path, 'stopped'), weights(tmp_path, 'ddp'), rtol=0, atol=0)
    for name in ('fsdp', 'fsdp2'):
        torch.testing.assert_close(weights(tmp_path, f'{name}_resumed'), weights(tmp_path, name), rtol=0, atol=0)
    _check_split(tmp_path)
    spied = torch.load(tmp_path / 'ddp_0.pt')
    # 4 batches an epoch, of which every second one applies what is accumulated
    assert sorted({step for step, _ in spied['syncs']}) == [1, 3, 5, 7]
    sent = sum(size for step, size in spied['syncs'] if step == 1)
    student = sum(value.numel() for value in weights(tmp_path, 'ddp').values())
    assert sent == spied['parameters'] == student and not spied['unused']


def _check_split(folder):
    """A teacher in shards gives the losses and the student of a whole one, and each process holds half of it."""
    looks = {name: [torch.load(folder / f'{name}_{rank}.pt') for rank in range(2)] for name in ('ddp', *SPLIT)}
    for name in looks:
        whole = 'amp_ddp' if 'amp' in name else 'ddp'
        close = dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dict(weights(folder, name)), dict(weights(folder, whole)), **close)
        for look, wanted in zip(looks[name], looks[whole], strict=True):
            assert len(look['losses']) == 8 and look['losses'] == pytest.approx(wanted['losses'], rel=1e-5)
        assert len(weights(folder, name)) == STUDENT
        held, parameters = [look['held'] for look in looks[name]], looks[name][0]['whole']
        if name == whole:
            assert held == [parameters, parameters]
        else:  # a tensor of an odd length is not halved
            assert sum(held) == parameters and max(held) < 0.55 * parameters
    rounded, exact = looks['amp_ddp'][0]['losses'], looks['ddp'][0]['losses']
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)


def _steps(model, batches):
    """The student after a step on each batch."""
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5))
    for data in batches:
        model.train_step(data, wrapper)
    return {key: value for key, value in model.state_dict().items() if 'architecture' in key}


def _student_of_groups():
    student = network(2)
    student['backbone']['norm_cfg'] = dict(type='GN', num_groups=1)
    torch.manual_seed(0)
    return build(distillation(architecture=student)).train()


def _train_with_static_graph(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    model = MMDistributedDataParallel(_student_of_groups(), broadcast_buffers=False, static_graph=True)
    torch.save(_steps(model, [batch(5, seed=2 * step + rank) for step in range(3)]), folder / f'static_{rank}.pth')


@pytest.mark.skipif(torch.cuda.is_available(), reason='two processes on a CPU')
def test_a_static_graph_gives_the_gradients_of_one_process(tmp_path):
    torch.multiprocessing.start_processes(_train_with_static_graph, (tmp_path,), nprocs=2, start_method='fork')
    whole = []
    for step in range(3):
        halves = [batch(5, seed=2 * step + rank) for rank in range(2)]
        samples = [sample for half in halves for sample in half['data_samples']]
        whole.append(dict(inputs=torch.cat([half['inputs'] for half in halves]), data_samples=samples))
    model = _student_of_groups()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = _steps(model, whole)
    assert any((value - before[key]).abs().max() > 1e-2 for key, value in expected.items())
    for rank in range(2):
        found = {
            key.removeprefix('module.'): value for key, value in torch.load(tmp_path / f'static_{rank}.pth').items()
        }
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def sharded_config(**kwargs):
    cfg = Config(dict(launcher='pytorch', optim_wrapper=dict(optimizer=dict(type='SGD')), **kwargs))
    choose_strategy(cfg, 'fsdp')
    return cfg


@pytest.mark.parametrize(
    'wrapper, words',
    [
        (dict(clip_grad=dict(max_norm=1)), 'clip_grad would use the norm of one shard'),
        (dict(paramwise_cfg=dict(norm_decay_mult=0)), r'paramwise_cfg \(norm_decay_mult\) goes by names'),
    ],
)
def test_fsdp_refuses_what_it_would_compute_from_a_shard(wrapper, words):
    cfg = sharded_config()
    cfg.optim_wrapper.update(wrapper)
    with pytest.raises(ValueError, match=f'{words}.* --strategy fsdp2'):
        prepare_strategy(cfg)


def test_fsdp_may_clip_values():
    cfg = sharded_config()
    cfg.optim_wrapper.clip_grad = dict(type='value', clip_value=1)
    prepare_strategy(cfg)
    assert cfg.strategy.state_dict_cfg and cfg.strategy.type == 'mmwsl.FSDPStrategy'


def test_sharding_needs_a_launcher():
    cfg = sharded_config()
    cfg.launcher = 'none'
    with pytest.raises(ValueError, match='tools/dist_train.sh CONFIG PROCESSES'):
        prepare_strategy(cfg)


def test_a_config_may_set_a_strategy_itself():
    cfg = Config(dict(launcher='pytorch', optim_wrapper=dict(), strategy=dict(type='FSDPStrategy')))
    prepare_strategy(cfg)
    assert cfg.runner_type == 'FlexibleRunner' and cfg.strategy.type == 'mmwsl.FSDPStrategy'
    own = Config(dict(strategy=dict(type='mmwsl.FullyShardStrategy', min_num_params=7)))
    choose_strategy(own, 'fsdp2')
    assert own.strategy == ConfigDict(type='mmwsl.FullyShardStrategy', min_num_params=7)
    choose_strategy(own, 'deepspeed')
    assert own.strategy == ConfigDict(CHOICES['deepspeed'])


def test_deepspeed_accumulates_and_clips_itself(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    cfg = Config(
        dict(
            launcher='pytorch',
            train_dataloader=dict(batch_size=7),
            optim_wrapper=dict(
                type='AmpOptimWrapper',
                optimizer=dict(type='SGD', lr=1),
                accumulative_counts=4,
                clip_grad=dict(max_norm=5),
            ),
        )
    )
    choose_strategy(cfg, 'deepspeed')
    with pytest.raises(ValueError, match='=4 gives wrong weights .* ZeRO 2: .*stage=1'):
        prepare_strategy(cfg)
    cfg.strategy.zero_optimization = dict(stage=1)
    prepare_strategy(cfg)
    assert cfg.optim_wrapper == dict(type='DeepSpeedOptimWrapper', optimizer=dict(type='SGD', lr=1))
    assert cfg.strategy == dict(
        CHOICES['deepspeed'],
        zero_optimization=dict(stage=1),
        gradient_accumulation_steps=4,
        train_micro_batch_size_per_gpu=7,
        gradient_clipping=5,
        bf16=dict(enabled=True),
    )


@pytest.mark.parametrize('installed, words', [((), 'DeepSpeed is not installed'), (('deepspeed',), 'no longer has')])
def test_a_deepspeed_that_mmengine_does_not_know_is_refused(monkeypatch, installed, words):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name if name in installed else None)
    cfg = sharded_config()
    choose_strategy(cfg, 'deepspeed')
    with pytest.raises(ImportError, match=f"{words}.*pip install 'deepspeed<=0.17.6'"):
        prepare_strategy(cfg)


def test_units_are_called_by_somebody_and_hold_enough():
    attention = nn.MultiheadAttention(8, 2)  # 288 parameters, of which 72 are its out_proj's
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 16), attention]), nn.Linear(8, 1))
    units = []
    left = shard_units(model, 70, units.append)
    assert units == [model[0], model[1][0], attention] and left == 9
