from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size, is_main_process, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from mmwsl.engine import console, gain
from mmwsl.engine.hooks.check_teacher_hook import CheckTeacherHook
from mmwsl.engine.overview import overview
from mmwsl.engine.ratings import Figure, chosen_figure
from mmwsl.engine.runners import counts_iterations, first_hook
from mmwsl.registry import HOOKS
from mmwsl.utils.files import shown

_FIGURES = 'mmwsl.figures'  # in the message hub, so in each checkpoint


@HOOKS.register_module()
class RunReportHook(Hook):
    """Show before the first step what will be trained, and at the end what was gained, the files and the next commands.

    The figure is the one by which :class:`BestCheckpointHook` chooses. The teacher's is what :class:`CheckTeacherHook`
    measured. The student alone is known if a run of it has finished in a folder next to this run's work dir: each run
    leaves a ``result.json`` there with its figures and a hash of network, data and schedule. Without validation there
    is nothing to compare, and only files and commands are shown. ``tools/train.py`` adds this hook.
    """

    def before_train(self, runner: Runner) -> None:
        self.start, self.begun_at = time.monotonic(), runner.iter
        found = _found(runner)
        teacher = '' if found is None else f'{found[0].name} {found[0].value:.4g} on {found[0].images:,} {found[1]}'
        console.tell(runner.logger, overview(runner, teacher))
        if is_main_process():
            (Path(runner.work_dir) / gain.RECORD).unlink(missing_ok=True)  # of an earlier run, which this one replaces

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        figures = dict(runner.message_hub.get_info(_FIGURES) or {})
        name = figures.get('name') or chosen_figure(metrics or {}, runner)
        if name is None or name not in (metrics or {}):
            return
        moment = runner.iter if counts_iterations(runner) else runner.epoch
        values = {**figures.get('values', {}), moment: float(metrics[name])}  # type: ignore[index]
        runner.message_hub.update_info(_FIGURES, dict(name=name, values=values))

    @master_only
    def after_train(self, runner: Runner) -> None:
        unit, length = ('iteration', runner.iter) if counts_iterations(runner) else ('epoch', runner.epoch)
        took = timedelta(seconds=round(time.monotonic() - self.start))
        several = 's' if length > 1 else ''
        lines = [f'\nDone: {length} {unit}{several}, {runner.iter - self.begun_at:,} steps in {took}.']
        result = self._result(runner, unit, length)
        if result is not None:
            result.save(Path(runner.work_dir))
            images = len(runner.val_dataloader.dataset)  # type: ignore[arg-type]
            teacher = _teacher(runner, result.name, images)
            lines.append(gain.gained(result, Path(runner.work_dir), teacher, images))
        console.tell(runner.logger, '\n'.join([*lines, *_files(runner)]))

    def _result(self, runner: Runner, unit: str, length: int) -> gain.Result | None:
        figures = runner.message_hub.get_info(_FIGURES)
        if not figures:
            return None
        values, better = figures['values'], _better(runner, figures['name'])
        best = next(
            moment for moment, value in values.items() if not any(better(other, value) for other in values.values())
        )
        return gain.Result(
            setup=gain.setup(runner.cfg, get_world_size()),
            taught=bool(runner.cfg.model.get('distiller')),
            seed=runner.seed,
            name=figures['name'],
            last=values[max(values)],
            best=values[best],
            best_at=best,
            length=length,
            unit=unit,
        )


def _better(runner: Runner, name: str) -> Callable[[float, float], bool]:
    """Return what compares two values of a figure: more is better, unless the CheckpointHook knows otherwise."""
    return getattr(first_hook(runner, CheckpointHook), 'is_better_than', {}).get(name, operator.gt)


def _found(runner: Runner) -> tuple[Figure, str] | None:
    return getattr(first_hook(runner, CheckTeacherHook), 'found', None)


def _teacher(runner: Runner, name: str, validated: int) -> tuple[float, str] | None:
    """Return what CheckTeacherHook measured, and a note if it was another figure or on other images."""
    found = _found(runner)
    if found is None:
        return None
    figure, images = found
    some = '' if (figure.images, images) == (validated, 'validation images') else f'of {figure.images:,} {images}'
    return figure.value, ', '.join(filter(None, ['' if figure.name == name else figure.name, some]))


def _files(runner: Runner) -> list[str]:
    """Return lines with the checkpoints, the log and the next commands."""
    hub, checkpoints = runner.message_hub, []
    for key in ('last_ckpt', 'best_ckpt'):
        path = Path(str(hub.get_info(key) or ''))
        if path.is_file():
            checkpoints.append(path)
    logs = [Path(runner.log_dir) / f'{runner.timestamp}.log', Path(runner.log_dir) / 'vis_data/scalars.json']
    files = [*checkpoints, *(path for path in logs if path.is_file())]
    found = ['Files:', *(f'  {shown(path)}' for path in files)] if files else []
    config = Path(runner.work_dir) / Path(runner.cfg.filename or f'{runner.timestamp}.py').name
    taught = bool(runner.cfg.model.get('distiller'))
    following = gain.commands(config, checkpoints[0], taught) if checkpoints and config.is_file() else []
    return [*found, *(['Next:', *(f'  {line}' for line in following)] if following else [])]
