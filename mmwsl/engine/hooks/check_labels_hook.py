from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmwsl.engine.data_checks import check_labels
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model


@HOOKS.register_module()
class CheckLabelsHook(Hook):
    """Check before the first step that all labels of training and validation images are among the predicted classes.

    ``tools/train.py`` adds this hook, unless the config has ``CheckTeacherHook``, which does the same.

    Raises:
        ValueError: If a label is not; the first such image is named.
    """

    def before_train(self, runner: Runner) -> None:
        model: Any = unwrapped_model(runner.model)
        predicted = predicted_classes(model)
        check_labels(runner.train_loop.dataloader.dataset, predicted, 'train_dataloader')
        if runner.val_loop is not None:
            check_labels(runner.val_loop.dataloader.dataset, predicted, 'val_dataloader')


def predicted_classes(model: Any) -> int | None:
    """Return how many classes a network, or a distillation's student, predicts; None if its head does not tell."""
    return getattr(getattr(getattr(model, 'student', model), 'head', None), 'num_classes', None)
