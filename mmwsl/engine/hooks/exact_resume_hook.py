from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import BatchSampler

from mmwsl.compat import number_batches_from
from mmwsl.datasets.views import InfiniteViewSampler, ViewSampler
from mmwsl.engine.hooks.epoch_seed_hook import EpochSeedHook
from mmwsl.engine.runners import counts_epochs
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model

_STATE = 'exact_resume'


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Save what mmengine leaves out of a checkpoint, so that a resumed run ends with the weights of an unbroken one.

    These are accumulated gradients that are not applied yet (with one process), the count of an EarlyStoppingHook, and
    whether the checkpoint's epoch or iteration was validated. If it was not, it is validated on resuming, so a learning
    rate that follows the metric, the best checkpoint and the log miss nothing. A checkpoint from within an epoch also
    holds the position there, from which a :class:`mmwsl.datasets.views.ViewSampler` continues, and the generators'
    states. If resuming cannot be exact, the reason is logged: another sampler or batch size within an epoch, a
    checkpoint without the optimiser's state, lost gradients, or random numbers that nothing repeats.
    ``tools/train.py`` adds this hook.
    """

    priority = 'LOWEST'  # a validation on resuming needs the other hooks ready

    def __init__(self) -> None:
        self.is_validated = False
        self.resumed: dict[str, Any] | None = None
        self.generators: list[dict[str, Any]] = []
        """States for the next checkpoint, one for each process; a single process reads its own as it saves."""
        self._position, self._restored = 0, dict[str, Any]()

    def before_train_epoch(self, runner: Runner) -> None:
        if self._position:
            runner.logger.info(
                f'Epoch {runner.epoch + 1} continues after {self._position} of '
                f'{len(runner.train_dataloader)} iterations.'
            )
            _begin_at(runner, self._position)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.is_validated = False
        if self._restored:
            restore_generators(self._restored)
            self._restored = {}

    def after_train_epoch(self, runner: Runner) -> None:
        if self._position:
            self._position = 0
            _begin_at(runner, 0)

    def before_val_epoch(self, runner: Runner) -> None:
        self.is_validated = True  # checkpoints saved from here on are saved after the validation

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if 'optimizer' in checkpoint:
            checkpoint[_STATE] = dict(
                is_validated=self.is_validated,
                gradients=_gradients(runner),
                stopping=[[hook.wait_count, hook.best_score] for hook in _stopping(runner)],
                **self._within_epoch(runner, checkpoint['meta']),
            )

    def _within_epoch(self, runner: Runner, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Return the position of a checkpoint within its epoch, with what it needs; empty at an epoch's end."""
        if not counts_epochs(runner):
            return {}
        position = meta['iter'] - meta['epoch'] * len(runner.train_dataloader)
        generators = self.generators or ([generator_states()] if get_world_size() == 1 else [])
        return dict(position=position, images_a_step=_images_a_step(runner), generators=generators) if position else {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if runner._resume:
            self.resumed = dict(has_optimizer='optimizer' in checkpoint, **checkpoint.get(_STATE, {}))

    def before_train(self, runner: Runner) -> None:
        if self.resumed is None:
            return
        state, self.resumed = self.resumed, None
        _restore(runner, state)
        if _can_continue(runner, state):
            self._position, self._restored = state['position'], _of_this_process(state)
        for reason in _inexact(runner, state):
            runner.logger.warning(
                f'This resumed run will not end with exactly the weights of an unbroken one: {reason}.'
            )
        if not state.get('is_validated') and _validation_is_due(runner):
            moment = f'Epoch {runner.epoch}' if counts_epochs(runner) else f'Iteration {runner.iter}'
            runner.logger.info(f'{moment} was not validated when its checkpoint was saved.')
            runner.val_loop.run()


def _stopping(runner: Runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _named_parameters(runner: Runner) -> Iterator[tuple[str, Any]]:
    model: Any = unwrapped_model(runner.model)
    return model.named_parameters()


def is_pending(runner: Runner) -> bool:
    """Whether gradients are accumulated that no step has applied."""
    several = runner.optim_wrapper
    wrappers = several.optim_wrappers.values() if isinstance(several, OptimWrapperDict) else [several]
    return any(
        isinstance(wrapper, OptimWrapper)
        and wrapper._inner_count % wrapper._accumulative_counts != 0
        and wrapper._inner_count != wrapper._max_counts
        for wrapper in wrappers
    )


def _gradients(runner: Runner) -> dict[str, Tensor]:
    """Return accumulated gradients by parameter; empty with several processes, each of which has its own."""
    if get_world_size() > 1 or not is_pending(runner):
        return {}
    return {name: parameter.grad.cpu() for name, parameter in _named_parameters(runner) if parameter.grad is not None}


def _restore(runner: Runner, state: dict[str, Any]) -> None:
    gradients = state.get('gradients') or {}
    for name, parameter in _named_parameters(runner):
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
    for hook, (count, best) in zip(_stopping(runner), state.get('stopping') or (), strict=False):
        hook.wait_count, hook.best_score = count, best


def generator_states() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators in this process."""
    return dict(
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state(),
        **(dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {}),
    )


def restore_generators(states: dict[str, Any]) -> None:
    """Set the generators to what :func:`generator_states` returned, here or in another process."""
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'].cpu())  # a checkpoint's tensors come to the model's device
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


def _of_this_process(state: dict[str, Any]) -> dict[str, Any]:
    """Return this process's generator states; empty if unknown, or of another number of processes."""
    known = state.get('generators') or ()
    return known[get_rank()] if len(known) == get_world_size() else {}


def _images_a_step(runner: Runner) -> int:
    """Return how many images a step of all processes reads; 0 if that number varies."""
    batches: Any = getattr(runner.train_dataloader, 'batch_sampler', None)
    return batches.batch_size * get_world_size() if type(batches) is BatchSampler else 0


def _can_continue(runner: Runner, state: dict[str, Any]) -> bool:
    """Whether a run can continue within its checkpoint's epoch."""
    return bool(
        state.get('position')
        and isinstance(_sampler(runner), ViewSampler)
        and _images_a_step(runner)
        and _images_a_step(runner) == state['images_a_step']
        and counts_epochs(runner)
    )


def _begin_at(runner: Runner, position: int) -> None:
    """Let an epoch begin after a number of its iterations."""
    _sampler(runner).skip(position * _images_a_step(runner) // get_world_size())
    number_batches_from(runner.train_loop, position)


def _inexact(runner: Runner, state: dict[str, Any]) -> Iterator[str]:
    """Yield the reasons why the weights will differ."""
    if _can_continue(runner, state):
        if not _of_this_process(state):
            yield (
                'dropout and mixup, if there are any, draw other numbers in the rest of this epoch, because its '
                'checkpoint has no generator states for this number of processes'
            )
    elif counts_epochs(runner) and not _is_at_an_epochs_end(runner):
        yield (
            f'its checkpoint has {runner.iter} iterations and {runner.epoch} epochs, and an epoch has '
            f'{len(runner.train_dataloader)}, so epoch {runner.epoch + 1} begins again with weights from within it, '
            'or the batch size was different. Resume with the same batch size and number of processes as before, and '
            "sampler=dict(type='mmwsl.ViewSampler', shuffle=True)"
        )
    if not state['has_optimizer']:
        yield (
            "its checkpoint does not hold the optimiser's state, as best_*.pth do not. Resume from an epoch's "
            'checkpoint'
        )
    if is_pending(runner) and not state.get('gradients'):
        yield (
            'gradients that were accumulated when it was saved are not in the checkpoint. Let accumulative_counts '
            'divide the iterations of an epoch'
        )
    if not any(isinstance(hook, EpochSeedHook) for hook in runner.hooks):
        yield (
            'dropout and mixup, if there are any, draw other numbers. Add '
            "custom_hooks=[dict(type='mmwsl.EpochSeedHook')]"
        )
    if not isinstance(_sampler(runner), ViewSampler | InfiniteViewSampler):
        name = 'ViewSampler' if counts_epochs(runner) else 'InfiniteViewSampler'
        yield (
            'augmentations, if there are any, draw other numbers. Put mmwsl.SeededViews around the dataset, with '
            f"sampler=dict(type='mmwsl.{name}', shuffle=True)"
        )


def _sampler(runner: Runner) -> Any:
    return getattr(getattr(runner.train_dataloader, 'batch_sampler', None), 'sampler', None)


def _is_at_an_epochs_end(runner: Runner) -> bool:
    return runner.iter == runner.epoch * len(runner.train_dataloader)


def _validation_is_due(runner: Runner) -> bool:
    """Whether mmengine's loop would validate after this epoch or iteration."""
    loop: Any = runner.train_loop
    if runner.val_loop is None or (counts_epochs(runner) and not _is_at_an_epochs_end(runner)):
        return False
    loop._decide_current_val_interval()
    done, last = (loop.epoch, loop.max_epochs) if counts_epochs(runner) else (loop.iter, loop.max_iters)
    return 0 < done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
