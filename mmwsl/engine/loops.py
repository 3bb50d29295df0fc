"""Tell runs by epochs from runs by iterations; a training loop of another package may be neither."""

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner


def counts_epochs(runner: Runner) -> bool:
    """Whether a run counts epochs."""
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def counts_iterations(runner: Runner) -> bool:
    """Whether a run counts iterations, not epochs."""
    return isinstance(runner.train_loop, IterBasedTrainLoop)
