"""Train a sharded student through mmengine's FlexibleRunner: choose a strategy, and prepare a config for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from mmengine._strategy import DDPStrategy
from mmengine._strategy import DeepSpeedStrategy as MMEngineDeepSpeedStrategy
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from mmwsl.compat import shard_without_cuda
from mmwsl.registry import STRATEGIES
from mmwsl.utils.sharding import shard_units

CHOICES: dict[str, dict[str, Any]] = {
    'fsdp': dict(
        type='mmwsl.FSDPStrategy',
        model_wrapper=dict(
            type='MMFullyShardedDataParallel',
            use_orig_params=True,
            auto_wrap_policy=dict(type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy', min_num_params=10**6),
        ),
    ),
    'fsdp2': dict(type='mmwsl.FullyShardStrategy'),
    'deepspeed': dict(
        type='mmwsl.DeepSpeedStrategy',
        zero_optimization=dict(stage=2),
        config=dict(zero_allow_untested_optimizer=True),  # SGD is untested there
    ),
}
"""Settings that ``tools/train.py --strategy`` puts into a config."""
_BY_NORM = 'norm'


def choose_strategy(cfg: Config, name: str) -> None:
    """Put one of :data:`CHOICES` into a config, in place; the config's own settings of that strategy stay."""
    own = cfg.get('strategy') or {}
    chosen = CHOICES[name]
    cfg.runner_type = 'FlexibleRunner'
    cfg.strategy = ConfigDict({**chosen, **(own if own.get('type') in (None, chosen['type']) else {})})


def prepare_strategy(cfg: Config) -> None:
    """Fill in what a strategy needs and a config leaves open, in place; nothing changes without ``strategy``.

    Raises:
        ValueError: If there is no launcher, or the strategy would not train what the config says.
        ImportError: If DeepSpeed is not installed, or in a version that mmengine cannot import.
    """
    if not cfg.get('strategy'):
        return
    cfg.setdefault('runner_type', 'FlexibleRunner')
    kind = str(cfg.strategy.get('type')).rpartition('.')[2]
    if cfg.get('launcher', 'none') == 'none' and kind != 'SingleDeviceStrategy':
        raise ValueError(
            f'{kind} shards over several processes, and without --launcher there is one. Start it with '
            'tools/dist_train.sh CONFIG PROCESSES'
        )
    if kind == 'FSDPStrategy':
        _check_fsdp(cfg)
        cfg.strategy.type = 'mmwsl.FSDPStrategy'
        cfg.strategy.setdefault('state_dict_cfg', 'full')
        cfg.strategy.setdefault('model_wrapper', dict(type='MMFullyShardedDataParallel', use_orig_params=True))
        shard_without_cuda(cfg.strategy)
    if kind == 'DeepSpeedStrategy':
        _check_deepspeed()
        cfg.strategy.type = 'mmwsl.DeepSpeedStrategy'
        _say_to_deepspeed(cfg)


def _check_fsdp(cfg: Config) -> None:
    """Raise ValueError for settings that FSDP 1 applies to shards as if they were whole parameters."""
    clip, paramwise = (cfg.optim_wrapper.get(key) for key in ('clip_grad', 'paramwise_cfg'))
    if clip and clip.get('type', _BY_NORM) == _BY_NORM:
        raise ValueError(
            'optim_wrapper.clip_grad would use the norm of one shard under FSDPStrategy, so each process '
            'would clip differently. Use --strategy fsdp2, or leave clip_grad out'
        )
    if paramwise:
        raise ValueError(
            f'optim_wrapper.paramwise_cfg ({", ".join(paramwise)}) goes by names and shapes, and '
            'FSDPStrategy changes both. Use --strategy fsdp2, or leave paramwise_cfg out'
        )
    if cfg.strategy.get('skip_init_weights'):
        raise ValueError("strategy.skip_init_weights=True would empty the teacher's weights, too: leave it out")


def _check_deepspeed() -> None:
    """Raise ImportError if there is no DeepSpeed that mmengine (0.10.12) can import."""
    if importlib.util.find_spec('deepspeed') is None:
        raise ImportError("DeepSpeed is not installed: pip install 'deepspeed<=0.17.6'")
    if importlib.util.find_spec('deepspeed.runtime.fp16.onebit') is None:
        raise ImportError(
            'mmengine imports deepspeed.runtime.fp16.onebit, which this DeepSpeed no longer '
            "has: pip install 'deepspeed<=0.17.6'"
        )


def _say_to_deepspeed(cfg: Config) -> None:
    """Use the optimiser wrapper for DeepSpeed's engine, which clips and accumulates gradients itself.

    Raises:
        ValueError: If gradients are accumulated in shards, which gives wrong weights (DeepSpeed 0.17.6 on a CPU).
    """
    wrapper = cfg.optim_wrapper
    stage = cfg.strategy.get('zero_optimization', {}).get('stage', 0)
    if wrapper.get('accumulative_counts', 1) > 1 and stage > 1:
        raise ValueError(
            f'optim_wrapper.accumulative_counts={wrapper.accumulative_counts} gives wrong weights '
            f"under DeepSpeed's ZeRO {stage}: add --cfg-options strategy.zero_optimization.stage=1, or "
            'use --strategy fsdp2'
        )
    cfg.optim_wrapper = ConfigDict(
        type='DeepSpeedOptimWrapper',
        **{key: wrapper[key] for key in ('optimizer', 'constructor', 'paramwise_cfg') if key in wrapper},
    )
    cfg.strategy.setdefault('train_micro_batch_size_per_gpu', cfg.train_dataloader.batch_size)
    if count := wrapper.get('accumulative_counts'):
        cfg.strategy.setdefault('gradient_accumulation_steps', count)
    if clip := wrapper.get('clip_grad'):
        cfg.strategy.setdefault('gradient_clipping', clip['max_norm'])
    if 'Amp' in str(wrapper.get('type')) and 'fp16' not in cfg.strategy:
        cfg.strategy.setdefault('bf16', dict(enabled=True))


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's FSDPStrategy (FSDP 1), able to resume; :func:`prepare_strategy` puts it in mmengine's place."""

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimiser's state; mmengine (0.10.7, 0.10.12) mixes up the arguments of torch (since 2.1)."""
        optimizer = self.optim_wrapper.optimizer
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, state_dict)
        )


@STRATEGIES.register_module()
class DeepSpeedStrategy(MMEngineDeepSpeedStrategy):
    """mmengine's DeepSpeedStrategy, with hooks at checkpoints; :func:`prepare_strategy` puts it in mmengine's place."""

    def save_checkpoint(
        self,
        filename: str,
        *,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a folder with a file for each process; hooks may add to the part that is not sharded."""
        told = {**(extra_ckpt or {}), 'optimizer': {}}
        if callback is not None:
            callback(told)
        del told['optimizer']
        super().save_checkpoint(filename, extra_ckpt=told, **kwargs)

    def resume(self, filename: str, *, callback: Callable[[dict], Any] | None = None, **kwargs: Any) -> dict:
        """Resume from a folder of :meth:`save_checkpoint`, and pass hooks the part that is not sharded."""
        checkpoint = super().resume(filename, **kwargs)
        if callback is not None:  # DeepSpeed has loaded the model strictly
            callback({**checkpoint, 'optimizer': {}, 'state_dict': self.model.state_dict()})
        return checkpoint


@STRATEGIES.register_module()
class FullyShardStrategy(DDPStrategy):
    """Shard parameters, gradients and the optimiser's state with torch's ``fully_shard`` (FSDP 2).

    Parameters keep their names and shapes, so ``paramwise_cfg``, ``clip_grad`` and the student's checkpoint are those
    of one process. The teacher, which is no submodule of the model, is whole in each process.

    Args:
        min_num_params: A submodule with at least so many parameters outside other units is sharded as a unit.
        kwargs: See mmengine's DDPStrategy.
    """

    def __init__(self, *, min_num_params: float = 1e6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_num_params = min_num_params
        self._whole: tuple[dict, dict] = {}, {}

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        model = self.convert_model(model.to(get_device()))
        mesh = torch.distributed.device_mesh.init_device_mesh(torch.device(get_device()).type, (self.world_size,))
        for child in model.children():
            shard_units(child, self.min_num_params, lambda unit: fully_shard(unit, mesh=mesh))
        fully_shard(model, mesh=mesh)
        return model

    def save_checkpoint(self, filename: str, **kwargs: Any) -> None:
        """Gather all shards, and let the first process write them as one file."""
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = self.optim_wrapper.optimizer
        self._whole = (
            sharded.get_model_state_dict(self.model, options=options),
            sharded.get_optimizer_state_dict(self.model, optimizer, options=options),
        )
        super().save_checkpoint(filename, **kwargs)
        self._whole = {}, {}

    def model_state_dict(self) -> dict:
        """Return the model's state dict, whole in the first process, which saves it."""
        return self._whole[0]

    def optim_state_dict(self) -> dict:
        """Return the optimiser's state by names of parameters, with that of a loss scaler."""
        own = self.optim_wrapper.state_dict()
        return {**{key: value for key, value in own.items() if key == 'loss_scaler'}, **self._whole[1]}

    def load_model_state_dict(self, state_dict: dict, *, strict: bool = False, **_: Any) -> None:
        """Load a whole state dict, of which each process keeps its shard."""
        sharded.set_model_state_dict(
            self.model, state_dict, options=sharded.StateDictOptions(full_state_dict=True, strict=strict)
        )

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimiser's whole state, of which each process keeps its shard."""
        state = dict(state_dict)
        if scaler := state.pop('loss_scaler', None):
            self.optim_wrapper.loss_scaler.load_state_dict(scaler)
        sharded.set_optimizer_state_dict(
            self.model, self.optim_wrapper.optimizer, state, options=sharded.StateDictOptions(full_state_dict=True)
        )
