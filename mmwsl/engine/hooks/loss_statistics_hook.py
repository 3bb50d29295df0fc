from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook, LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from mmwsl.registry import HOOKS


@HOOKS.register_module()
class LossStatisticsHook(Hook):
    """Ask the losses for statistics in the steps that are logged, and not in the others.

    What is logged is the last value, or for names that the log processor means by its ``mean_pattern`` the mean over
    its last steps, ten by default: those are asked for. Without this hook statistics are computed in each step, and
    what is logged is the same. ``tools/train.py`` adds it.
    """

    def before_train(self, runner: Runner) -> None:
        model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.distiller: Any = getattr(model, 'distiller', None)
        self.logger: Any = next((hook for hook in runner.hooks if isinstance(hook, LoggerHook)), None)
        self.by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        self.window = runner.log_processor.window_size
        self.everything = self.logger is None or bool(runner.log_processor.custom_cfg)  # it may look further back

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if hasattr(self.distiller, 'logs_statistics'):
            self.distiller.logs_statistics = self.everything or self._steps_to_go(runner, batch_idx) < self.window

    def after_train(self, runner: Runner) -> None:
        if hasattr(self.distiller, 'logs_statistics'):
            self.distiller.logs_statistics = True

    def _steps_to_go(self, runner: Runner, batch_idx: int) -> int:
        """Until the logger's next turn, as ``LoggerHook.after_train_iter`` takes them."""
        interval, steps, done = self.logger.interval, len(runner.train_dataloader), batch_idx + 1
        to_go = -done % interval
        if done <= steps and (steps <= interval or not self.logger.ignore_last):  # it logs an epoch's end, too
            return min(to_go, steps - done)
        if self.by_epoch and done + to_go > steps:
            return steps - done + interval
        return to_go
