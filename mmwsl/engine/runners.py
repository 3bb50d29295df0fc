"""Ask a runner about its loop and its hooks."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner


def counts_epochs(runner: Runner) -> bool:
    """Whether a run counts epochs; with a training loop of another package it may count neither."""
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def counts_iterations(runner: Runner) -> bool:
    """Whether a run counts iterations, not epochs."""
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def first_hook(runner: Runner, kind: type[Hook]) -> Any:
    """Return a runner's first hook of a type, or None."""
    return next((hook for hook in runner.hooks if isinstance(hook, kind)), None)
