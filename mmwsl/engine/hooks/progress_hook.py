from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner
from rich.progress import Progress

from mmwsl.engine import console
from mmwsl.engine.overview import legend
from mmwsl.engine.ratings import chosen_figure, is_number
from mmwsl.engine.runners import counts_iterations, first_hook
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model

_FIGURES = 3  # of a validation
_TIMED = 10  # steps that are timed for a first estimate, after as many that are not


@HOOKS.register_module()
class ProgressHook(Hook):
    """Show a row of figures for each step that is logged, the results of validation, and the progress of a test.

    The names are explained above the first row. The log file has mmengine's own lines with further figures. If the
    console shows mmengine's log (``--verbose``), this hook shows nothing. Nothing is read from a GPU: the figures are
    those that the logger has just written. ``tools/train.py`` and ``tools/test.py`` add this hook.
    """

    priority = 'LOW'  # after the logger

    def before_train(self, runner: Runner) -> None:
        self.logger = first_hook(runner, LoggerHook)
        self.columns: list[str] = []
        self.first, self.start = runner.iter, 0.0

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._estimate(runner, runner.iter + 1 - self.first)
        if self._is_logged(runner, batch_idx):
            self._show_row(runner, batch_idx)

    def _estimate(self, runner: Runner, done: int) -> None:
        """Estimate the time that is left after the first steps, unless the first row follows soon."""
        if done == _TIMED:
            self.start = time.perf_counter()
        if done == 2 * _TIMED and self.logger and min(self.logger.interval, len(runner.train_dataloader)) > done:
            seconds = (time.perf_counter() - self.start) / _TIMED
            left = _shown(seconds * (runner.max_iters - runner.iter - 1))
            console.show(runner.logger, f'{seconds:.3g} s a step: about {left} left, without validation')

    def _is_logged(self, runner: Runner, batch_idx: int) -> bool:
        """Whether ``LoggerHook.after_train_iter`` logs this step."""
        if self.logger is None:
            return False
        steps, interval = len(runner.train_dataloader), self.logger.interval
        ends = self.end_of_epoch(runner.train_dataloader, batch_idx)
        return self.every_n_inner_iters(batch_idx, interval) or (
            ends and (not self.logger.ignore_last or steps <= interval)
        )

    def _show_row(self, runner: Runner, batch_idx: int) -> None:
        figures = _figures(runner)
        if not self.columns:
            self.columns = [name for name in figures if _is_shown(name)]
            console.show(runner.logger, f'\n{legend(unwrapped_model(runner.model), self.columns)}\n')
            head = [f'{"step" if counts_iterations(runner) else "epoch step":>16}', *self.columns, 'lr', 'left']
            console.show(runner.logger, '  '.join([f'{name:>8}' for name in head]))
        cells = [
            f'{_place(runner, batch_idx):>16}',
            *(f'{figures.get(name, float("nan")):>{max(8, len(name))}.4g}' for name in self.columns),
            f'{figures.get("lr", float("nan")):>8.3g}',
            f'{_shown(runner.message_hub.get_info("eta") or 0):>8}',
        ]
        console.show(runner.logger, '  '.join(cells))

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        numbers = {name: float(value) for name, value in (metrics or {}).items() if is_number(value)}
        counts = chosen_figure(numbers, runner)  # shown first, with few others: mmdet has a dozen
        names = sorted(numbers, key=lambda name: name != counts)[:_FIGURES]
        shown = ', '.join(f'{name} {numbers[name]:.4g}' for name in names)
        moment = f'step {runner.iter}' if counts_iterations(runner) else f'epoch {runner.epoch}'
        console.show(runner.logger, f'validation after {moment}: {shown}')

    def before_test_epoch(self, runner: Runner) -> None:
        console.show(runner.logger, f'Testing on {len(runner.test_dataloader.dataset):,} images.')  # type: ignore[arg-type]
        self.bar = Progress(disable=not (console.is_quiet(runner.logger) and sys.stdout.isatty()), transient=True)
        self.task = self.bar.add_task('testing', total=len(runner.test_dataloader))
        self.bar.start()

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.bar.advance(self.task)
        if batch_idx + 1 == len(runner.test_dataloader):
            self.bar.stop()
            console.unquiet(runner.logger)  # tables of metrics, and the figures


def _figures(runner: Runner) -> dict[str, float]:
    """Return the figures that the logger wrote for this step, by name, averaged if the log processor does so."""
    processor, found = runner.log_processor, {}
    for key, buffer in runner.message_hub.log_scalars.items():
        mode, _, name = key.partition('/')
        if mode == 'train':
            values, _ = buffer.data
            means = processor.mean_pattern.match(name) is not None
            found[name] = float(buffer.mean(min(processor.window_size, len(values))) if means else buffer.current())
    return found


def _is_shown(name: str) -> bool:
    """Whether a row has room for a figure; the log file has all."""
    return 'loss' in name or name in ('distill.kl', 'distill.wsl_weight')


def _place(runner: Runner, batch_idx: int) -> str:
    if counts_iterations(runner):
        return f'{runner.iter + 1}/{runner.max_iters}'
    return f'{runner.epoch + 1}/{runner.max_epochs} {batch_idx + 1}/{len(runner.train_dataloader)}'


def _shown(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
