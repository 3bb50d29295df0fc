"""Check and prepare the configs of runs that train together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import Tensor, nn

from mmwsl.utils.data import dataset_chain

# Hooks that do not change what is trained. The checks among them are made here, too.
_WATCHING = (
    'EpochSeedHook',
    'CheckTeacherHook',
    'CheckLabelsHook',
    'CheckResumeHook',
    'ExactResumeHook',
    'FiniteLossHook',
    'LossStatisticsHook',
    'LateScalarsHook',
    'ChannelsLastHook',
)
_LOOP = 'EpochBasedTrainLoop'
_ELSE = 'change that, or train the runs separately (tools/sweep.py without --together)'


def check_config(cfg: Config) -> None:
    """Raise ValueError for settings that are not possible if runs train together."""
    wrapper, loop = cfg.optim_wrapper, cfg.train_cfg
    mixed = wrapper.get('type') == 'AmpOptimWrapper' and wrapper.get('dtype') == 'bfloat16'  # needs no scaling
    asked = {
        'optim_wrapper.clip_grad': wrapper.get('clip_grad'),
        'optim_wrapper.accumulative_counts': wrapper.get('accumulative_counts', 1) != 1,
        'optim_wrapper.optimizer.dampening': wrapper.optimizer.get('dampening'),
        f"optim_wrapper.type={wrapper.get('type')!r} (in mixed precision it is dtype='bfloat16')": wrapper.get(
            'type', 'OptimWrapper'
        )
        != 'OptimWrapper'
        and not mixed,
        'model.teacher_cache': cfg.model.get('teacher_cache'),
        'load_from': cfg.get('load_from'),
        'compile': cfg.get('compile'),
        'auto_scale_lr.enable': (cfg.get('auto_scale_lr') or {}).get('enable'),
        'a val_evaluator other than Accuracy': not _is(cfg.get('val_evaluator'), 'Accuracy'),
        'a train_cfg that is not by epoch': not loop.get('by_epoch') or loop.get('type', _LOOP) != _LOOP,
        **{
            f'the hook {hook["type"]!r}': hook['type'].rpartition('.')[2] not in _WATCHING
            for hook in cfg.get('custom_hooks') or []
        },
    }
    refused = [name for name, present in asked.items() if present]
    if refused:
        raise ValueError(f'runs that train together cannot have {" or ".join(refused)}: {_ELSE}')


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that draws or counts on the host in each step, which a graph cannot repeat."""
    if getattr(model.data_preprocessor, 'batch_augments', None) is not None:
        raise ValueError(f'runs that train together cannot mix images (train_cfg.augments): {_ELSE}')
    losses = getattr(getattr(model, 'distiller', None), 'distill_losses', {})
    warming = [name for name, loss in losses.items() if getattr(loss, 'warmup_epochs', 0)]
    if warming:
        raise ValueError(f'runs that train together cannot have warmup_epochs, as in {warming}: {_ELSE}')


def check_alike(configs: Sequence[Config]) -> None:
    """Raise ValueError for the first setting that should be the same in all configs and is not."""
    for key in ('train_dataloader', 'val_dataloader', 'data_preprocessor'):
        if any(cfg.get(key) != configs[0].get(key) for cfg in configs):
            raise ValueError(
                f'runs that train together should have the same {key}, and these differ in it: '
                f'{[Path(cfg.filename).stem for cfg in configs]}'
            )
    for key in ('max_epochs', 'val_interval'):
        if len({cfg.train_cfg.get(key, 1) for cfg in configs}) > 1:
            raise ValueError(
                f'runs that train together should have the same train_cfg.{key}, got '
                f'{[cfg.train_cfg.get(key, 1) for cfg in configs]}'
            )
    unseeded = [Path(cfg.filename).stem for cfg in configs if cfg.get('randomness', {}).get('seed') is None]
    if unseeded:
        raise ValueError(f'runs that train together need a seed: set randomness.seed of {unseeded}')


def put_on_device(cfg: Config) -> None:
    """Change a config, in place, so that its images stay on the device; they may be padded, cropped and flipped.

    LabelNoise, which gives an image the same label each time, runs once.

    Raises:
        ValueError: If another transform is in a pipeline.
    """
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        if not _is(loader.dataset, 'DeviceDataset'):
            dataset = loader.dataset.dataset if _is(loader.dataset, 'SeededViews') else loader.dataset
            innermost = dataset_chain(dataset)[-1]  # of a Fold or a BootstrapDataset
            settings = _views(innermost.pipeline, f'{split}_dataloader')
            innermost.pipeline = [
                *(each for each in innermost.pipeline if _is(each, 'LabelNoise')),
                dict(type='PackInputs'),
            ]
            loader.dataset = dict(type='mmwsl.DeviceDataset', dataset=dataset, **settings)
        loader.update(
            num_workers=0, persistent_workers=False, pin_memory=False, collate_fn=dict(type='mmwsl.identity_collate')
        )


def _views(pipeline: Sequence[dict], where: str) -> dict[str, Any]:
    """Return the settings of a DeviceDataset that replaces a pipeline; raise ValueError if none can."""
    settings: dict[str, Any] = {}
    for transform in pipeline:
        if _is(transform, 'RandomCrop') and set(transform) == {'type', 'crop_size', 'padding'}:
            settings['padding'] = transform['padding']
        elif _is(transform, 'RandomFlip') and transform.get('direction', 'horizontal') == 'horizontal':
            settings['flip_prob'] = transform['prob']
        elif not (_is(transform, 'PackInputs') or _is(transform, 'LabelNoise')):
            raise ValueError(
                f'{where} has {transform["type"]} in its pipeline, but images of runs that train together have '
                f'one size, and are only padded, cropped and flipped (mmwsl.DeviceDataset): {_ELSE}'
            )
    return settings


def _is(config: Any, name: str) -> bool:
    return isinstance(config, dict) and str(config['type']).rpartition('.')[2] == name


def learning_rates(wrapper: OptimWrapper, cfg: Config, steps: int) -> Tensor:
    """Return the learning rate of each step and parameter group by the schedulers. Shape: (all steps, groups).

    Raises:
        ValueError: If a scheduler changes anything else.
    """
    schedulers, before, rates = _schedulers(wrapper, cfg, steps), _others(wrapper), []
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*before `optimizer.step')  # no optimizer.step comes in between
        for step in range(cfg.train_cfg.max_epochs * steps):
            rates.append([group['lr'] for group in wrapper.param_groups])
            for scheduler in schedulers:
                if not scheduler.by_epoch or (step + 1) % steps == 0:
                    scheduler.step()
    if _others(wrapper) != before:
        raise ValueError(
            f'runs that train together cannot schedule more than the learning rate (param_scheduler): {_ELSE}'
        )
    return torch.tensor(rates, dtype=torch.float64)


def _others(wrapper: OptimWrapper) -> list[dict]:
    """Return the settings of the parameter groups other than the learning rate."""
    return [
        {key: value for key, value in group.items() if key not in ('params', 'lr')} for group in wrapper.param_groups
    ]


def _schedulers(wrapper: OptimWrapper, cfg: Config, steps: int) -> list:
    """Build the config's schedulers as mmengine's Runner does."""
    configs = cfg.get('param_scheduler') or []
    built = []
    for config in [configs] if isinstance(configs, dict) else configs:
        config = {'end': cfg.train_cfg.max_epochs, **config} if config.get('by_epoch', True) else dict(config)
        extra = dict(optimizer=wrapper)
        if config.pop('convert_to_iter_based', False):
            extra.update(epoch_length=steps, convert_to_iter_based=True)
        built.append(PARAM_SCHEDULERS.build(config, default_args=extra))
    return built
