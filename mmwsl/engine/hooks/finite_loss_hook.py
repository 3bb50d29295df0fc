from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner
from torch import Tensor

from mmwsl.engine.runners import first_hook
from mmwsl.registry import HOOKS


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop a run that cannot recover, since neither its loss nor its parameters are finite.

    Only the steps that are logged are checked, so no other waits for a GPU. Under mixed precision a loss may overflow
    once, and its step is skipped: this is only logged as a warning. ``tools/train.py`` adds this hook.

    Raises:
        RuntimeError: If neither is finite; the message names the losses and one parameter that are not.
    """

    def before_train(self, runner: Runner) -> None:
        self.interval = getattr(first_hook(runner, LoggerHook), 'interval', 100)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        logs = self.every_n_inner_iters(batch_idx, self.interval) or self.end_of_epoch(
            runner.train_dataloader, batch_idx
        )
        loss = (outputs or {}).get('loss')
        if not logs or not isinstance(loss, Tensor) or bool(torch.isfinite(loss).all()):
            return
        parts = ', '.join(
            f'{name} {float(value):.4g}'
            for name, value in (outputs or {}).items()
            if isinstance(value, Tensor) and value.numel() == 1 and not bool(torch.isfinite(value))
        )
        broken = next(
            (name for name, parameter in runner.model.named_parameters() if not bool(torch.isfinite(parameter).all())),
            None,
        )
        if broken is None:
            runner.logger.warning(f'Not finite in step {runner.iter + 1}: {parts}. The parameters are still finite.')
            return
        raise RuntimeError(
            f'training has diverged: in step {runner.iter + 1} these are not finite: {parts}, and the parameter '
            f'{broken}. Use a smaller learning rate or loss_weight (the gradient of soft '
            'labels grows with tau times loss_weight), or look for images that are not finite'
        )
