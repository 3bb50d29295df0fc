from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner
from torch import Tensor

from mmwsl.engine.runners import counts_iterations, first_hook
from mmwsl.models.losses import WeightedLoss
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model


@HOOKS.register_module()
class LossStatisticsHook(Hook):
    """Compute the losses' statistics only in the steps that the log needs.

    The log shows a statistic's last value or, for names that match the log processor's ``mean_pattern``, the mean over
    its last steps, ten by default; the statistics are computed in these steps. Without this hook they are computed in
    each step, and the log is the same. ``tools/train.py`` adds it.

    MMRazor's distillers log only losses. For each :class:`mmwsl.models.WeightedLoss` in one of them, this hook logs the
    statistics, under the names that they have in :class:`mmwsl.models.WSLDistiller`.
    """

    def before_train(self, runner: Runner) -> None:
        model: Any = unwrapped_model(runner.model)
        distiller: Any = getattr(model, 'distiller', None)
        self.distiller: Any = unwrapped_model(distiller)
        self.logger = first_hook(runner, LoggerHook)
        self.by_epoch = not counts_iterations(runner)
        self.window = runner.log_processor.window_size
        self.everything = self.logger is None or bool(
            runner.log_processor.custom_cfg
        )  # a custom_cfg may look further back

        self.weighted: list[WeightedLoss] = []  # whose statistics nobody else logs
        if not hasattr(self.distiller, 'logs_statistics'):
            losses = getattr(self.distiller, 'distill_losses', {}).values()
            self.weighted = [loss for loss in losses if isinstance(loss, WeightedLoss)]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if hasattr(self.distiller, 'logs_statistics'):
            self.distiller.logs_statistics = self._is_wanted(runner, batch_idx)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.weighted or not self._is_wanted(runner, batch_idx):
            return
        found: dict[str, Tensor] = {}
        for position, loss in enumerate(self.weighted, 1):
            for name, value in loss.statistics.items():
                found[f'{name}_{position}' if name in found else name] = value
        runner.message_hub.update_scalars({f'train/distill.{name}': value for name, value in found.items()})

    def after_train(self, runner: Runner) -> None:
        if hasattr(self.distiller, 'logs_statistics'):
            self.distiller.logs_statistics = True

    def _is_wanted(self, runner: Runner, batch_idx: int) -> bool:
        return self.everything or self._steps_to_go(runner, batch_idx) < self.window

    def _steps_to_go(self, runner: Runner, batch_idx: int) -> int:
        """Return the number of steps until ``LoggerHook.after_train_iter`` logs again."""
        interval, steps, done = self.logger.interval, len(runner.train_dataloader), batch_idx + 1
        to_go = -done % interval
        if done <= steps and (steps <= interval or not self.logger.ignore_last):  # it logs an epoch's end, too
            return min(to_go, steps - done)
        if self.by_epoch and done + to_go > steps:
            return steps - done + interval
        return to_go
