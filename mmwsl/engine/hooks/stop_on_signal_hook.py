from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmwsl.engine.hooks.exact_resume_hook import ExactResumeHook, generator_states, is_pending
from mmwsl.engine.runners import counts_epochs
from mmwsl.registry import HOOKS

NAME = 'interrupted.pth'
_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGUSR2') if hasattr(signal, name)]


@HOOKS.register_module()
class StopOnSignalHook(Hook):
    """On SIGTERM, SIGUSR1 (Slurm's ``--signal=USR1@120``) or SIGUSR2 (submitit's), end the step, save and exit.

    The checkpoint is ``interrupted.pth`` in the work dir. With :class:`ExactResumeHook` and a
    :class:`mmwsl.datasets.views.ViewSampler`, a run that resumes from it ends with the weights of an unbroken one. The
    exit status is 128 plus the signal's number. Several processes stop together, after a step that applied all
    gradients. During their validations a signal ends them at once, and resuming validates again. ``tools/train.py``
    adds this hook.

    Args:
        interval: Steps after which several processes ask each other whether one of them should stop; a single
            process can stop after any step.
        grace: Seconds from the signal until a process that is stuck in a step, because another one is gone, is killed.
    """

    priority = 95  # type: ignore[assignment]  # after what changes or saves the run's state, and before ExactResumeHook

    def __init__(self, interval: int = 10, grace: int = 20) -> None:
        self.interval, self.grace = interval, grace
        self.received = self.agreed = 0
        self._is_in_step = False
        self._meta: dict[str, int] = {}
        self._before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        loaders = [loop.dataloader for loop in (runner.train_loop, runner.val_loop) if loop is not None]
        for loader in loaders:
            loader.worker_init_fn = partial(_hear_the_run_alone, getattr(loader, 'worker_init_fn', None))

    def after_train(self, runner: Runner) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._is_in_step = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        self._is_in_step = False
        # the checkpoint of an epoch's last step is the epoch's own
        is_last = counts_epochs(runner) and batch_idx + 1 == len(runner.train_dataloader)
        if not is_last and self._is_to_stop(runner, self.every_n_train_iters(runner, self.interval)):
            self._stop(runner, runner.epoch, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if counts_epochs(runner) and self._is_to_stop(runner, True):
            self._stop(runner, runner.epoch + 1, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        if get_world_size() > 1:
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._before and self.received and get_world_size() == 1:
            self._stop(runner, runner.epoch, runner.iter)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        if get_world_size() > 1:
            for number in self._before:
                signal.signal(number, self._receive)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta'].update(self._meta)

    def _receive(self, number: int, _: Any) -> None:
        self.received = number
        if self._is_in_step and hasattr(signal, 'alarm'):
            signal.alarm(self.grace)  # it has no handler, so it ends a process even if Python does not get a turn

    def _is_to_stop(self, runner: Runner, is_due: bool) -> bool:
        """Whether this step is the last one; the same in all processes."""
        if get_world_size() == 1:
            self.agreed = self.received
        elif not self.agreed and is_due:
            flag = torch.tensor(self.received)
            all_reduce(flag, 'max')
            self.agreed = int(flag)
        return self.agreed > 0 and (get_world_size() == 1 or not is_pending(runner))

    def _stop(self, runner: Runner, epoch: int, iteration: int) -> None:
        if hasattr(signal, 'alarm'):
            signal.alarm(0)
        states = all_gather_object(generator_states())
        for hook in runner.hooks:
            if isinstance(hook, ExactResumeHook):
                hook.generators = states
        self._meta = dict(epoch=epoch, iter=iteration)
        runner.save_checkpoint(runner.work_dir, NAME, by_epoch=False)
        if is_main_process():
            Path(runner.work_dir, 'last_checkpoint').write_text(str(Path(runner.work_dir, NAME)))
        number = signal.Signals(self.received or self.agreed)
        runner.logger.warning(
            f'{number.name} stopped the run after iteration {iteration}, in epoch {epoch + 1}. The '
            f'same command with --resume continues from {NAME}.'
        )
        barrier()  # a launcher that sees one process end ends the others
        self.after_train(runner)
        raise SystemExit(128 + number)


def _hear_the_run_alone(init: Callable[[int], None] | None, worker: int) -> None:
    """Let a dataloader's worker ignore the signals that Slurm sends to all processes of a job, but not its own run's.

    A run that ends sends SIGTERM to workers that are left, and waits for them.
    """
    for number in _SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in threads that begin later, too
        threading.Thread(target=_end_with_the_run, args=(os.getppid(),), daemon=True).start()
    if init is not None:
        init(worker)


def _end_with_the_run(run: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)
