from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.runner import Runner
from torch import Tensor

from mmwsl.engine.runners import first_hook
from mmwsl.registry import HOOKS


@HOOKS.register_module()
class LateScalarsHook(RuntimeInfoHook):
    """Work as mmengine's RuntimeInfoHook, but leave what a step logs on the GPU until the logger reads it.

    mmengine's own hook reads each logged scalar in each step, and the host waits for the device each time. Here all of
    them reach the message hub in order, in one copy for each type: before the logger reads them, at the end of an epoch
    and before a checkpoint. A hook that reads training scalars in between finds those of the last copy. On a CPU
    nothing changes. ``tools/train.py`` uses it as ``default_hooks.runtime_info``.
    """

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.interval = getattr(first_hook(runner, LoggerHook), 'interval', 1)
        self.unread: list[dict[str, Any]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        # detached, since a loss would keep its graph in memory
        self.unread.append(
            {name: value.detach() if isinstance(value, Tensor) else value for name, value in (outputs or {}).items()}
        )
        if (
            self.every_n_inner_iters(batch_idx, self.interval)
            or self.end_of_epoch(runner.train_dataloader, batch_idx)
            or not any(map(waits, self.unread[-1].values()))
        ):
            self._read(runner)

    def after_train(self, runner: Runner) -> None:
        if self.unread:  # a run by iterations may end before the logger's next turn
            self._read(runner)
        super().after_train(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if getattr(self, 'unread', None):
            self._read(runner)
            checkpoint['message_hub'] = runner.message_hub.state_dict()

    def _read(self, runner: Runner) -> None:
        values = _values([value for step in self.unread for value in step.values() if waits(value)])
        for step in self.unread:
            read = {name: values.get(id(value), value) for name, value in step.items()}
            super().after_train_iter(runner, 0, outputs=read)
        self.unread = []


def waits(value: Any) -> bool:
    """Whether reading a value makes the host wait for a device."""
    return isinstance(value, Tensor) and value.device.type != 'cpu'


def _values(scalars: list[Tensor]) -> dict[int, float]:
    """Return the values of scalars by id, read in one copy for each type."""
    found: dict[int, float] = {}
    for dtype in {scalar.dtype for scalar in scalars}:
        alike = [scalar for scalar in scalars if scalar.dtype == dtype]
        values = torch.stack([scalar.reshape(()) for scalar in alike]).tolist()
        found.update(zip(map(id, alike), values, strict=True))
    return found
