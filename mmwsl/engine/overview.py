"""Describe a run on one screen before it starts, and explain the columns of its log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.runner import Runner
from torch import nn

from mmwsl.engine.hooks.check_labels_hook import predicted_classes
from mmwsl.engine.runners import counts_iterations
from mmwsl.models.losses import WeightedLoss
from mmwsl.models.teachers import CachedTeacher
from mmwsl.utils.checkpoint import unwrapped_model
from mmwsl.utils.files import shown
from mmwsl.version import __version__


def overview(runner: Runner, teacher: str = '') -> str:
    """Return a run's description: networks, losses, data, length, machine and folder.

    Args:
        runner: Before its first step.
        teacher: The teacher's score in words, if it is known.
    """
    model: Any = unwrapped_model(runner.model)
    rows = [
        ('student' if hasattr(model, 'student') else 'network', _network(getattr(model, 'student', model))),
        *_teaching(model, teacher),
        ('data', _data(runner)),
        ('length', _length(runner)),
        ('machine', _machine()),
        ('files', _files(runner)),
    ]
    name = Path(runner.cfg.filename or runner.work_dir).stem
    return '\n'.join(
        [f'mmwsl {__version__} trains {name}, seed {runner.seed}', *(f'  {row:9}{text}' for row, text in rows)]
    )


def _network(network: nn.Module) -> str:
    parts = [type(part).__name__ for part in (network, getattr(network, 'backbone', None)) if part is not None]
    values = sum(parameter.numel() for parameter in network.parameters())
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values()) / 1e6
    return f'{" of ".join(parts)}, {values:,} parameters ({size:.3g} MB)'


def _teaching(model: Any, teacher: str) -> Iterator[tuple[str, str]]:
    network = getattr(model, 'teacher', None)
    if isinstance(network, CachedTeacher):
        yield 'teacher', f'recorded answers{teacher and ", "}{teacher}'
    elif network is not None:
        yield 'teacher', f'{_network(network)}{teacher and ", "}{teacher}'
    for name, loss in getattr(getattr(model, 'distiller', None), 'distill_losses', {}).items():
        yield 'by', f'{name}: {_loss(loss)}'


def _loss(loss: Any) -> str:
    if not isinstance(loss, WeightedLoss):
        return type(loss).__name__
    return (
        f'{loss.loss_weight:g} * {type(loss.sample_loss).__name__} at tau {loss.tau:g}, weighted by '
        f'{type(loss.sample_weighting).__name__}'
    )


def _data(runner: Runner) -> str:
    loader: Any = runner.train_dataloader
    classes = len(getattr(loader.dataset, 'metainfo', {}).get('classes') or ())
    batch = (loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 0)) * get_world_size()
    validated = '' if runner.val_loop is None else f', {len(runner.val_dataloader.dataset):,} for validation'  # type: ignore[arg-type]
    return f'{len(loader.dataset):,} images{validated}{f", {classes} classes" if classes else ""}; {batch} in a batch'


def _length(runner: Runner) -> str:
    done = f', of which {runner.iter:,} steps are done' if runner.iter else ''
    if counts_iterations(runner):
        return f'{runner.max_iters:,} steps{done}'
    epochs = '1 epoch' if runner.max_epochs == 1 else f'{runner.max_epochs} epochs'
    return f'{epochs} of {len(runner.train_dataloader):,} steps{done}'


def _machine() -> str:
    several = f'{get_world_size()} processes, each on ' if get_world_size() > 1 else ''
    if not torch.cuda.is_available():
        return f'{several}the CPU, threads: {torch.get_num_threads()}'
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
    return f'{several}{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GB free'


def _files(runner: Runner) -> str:
    return f'{shown(Path(runner.work_dir))}, log and figures in {Path(runner.log_dir).name}/'


def legend(model: Any, columns: list[str]) -> str:
    """Return a line of explanation for each column of a log whose name does not explain itself."""
    meanings = {'loss': 'what is minimised, the sum of all losses', **_of_student(model), **_of_losses(model)}
    return '\n'.join(f'  {name:{max(map(len, columns))}}  {meanings[name]}' for name in columns if name in meanings)


def _of_student(model: Any) -> dict[str, str]:
    classes = predicted_classes(model)
    guess = f'; guessing costs {math.log(classes):.3f}, the logarithm of {classes}' if classes else ''
    factor = getattr(model, 'student_loss_weight', 1)
    scale = f', times {factor:g}' if factor != 1 else ''
    return {'student.loss': f"the student's own loss against the labels{scale}{guess if factor == 1 else ''}"}


def _of_losses(model: Any) -> dict[str, str]:
    found = {
        'distill.kl': 'the part of the cross-entropy that can be learned: KL(teacher, student) at tau, 0 at best',
        'distill.wsl_weight': 'mean weight of the soft labels, from 0 to 1; percentiles are in the log file',
    }
    for name, loss in getattr(getattr(model, 'distiller', None), 'distill_losses', {}).items():
        if isinstance(loss, WeightedLoss) and loss.sample_loss.never_vanishes:
            found[f'distill.{name}'] = (
                f'{loss.loss_weight:g} * weight * {loss.tau:g}^2 * cross-entropy with the '
                'teacher at tau: large, and never 0'
            )
    return found
