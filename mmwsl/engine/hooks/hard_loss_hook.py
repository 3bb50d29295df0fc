from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmwsl.engine.hooks.check_labels_hook import predicted_classes
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model

_LOSS = 'train/student.loss'
_MARGIN = 1.1  # a student that has not begun to learn is as good as guessing, or slightly better or worse


@HOOKS.register_module()
class HardLossHook(Hook):
    """Warn if a student is worse than guessing after its first epoch, as happens if the learning rate is too large.

    Soft labels multiply the gradient by up to 1 + tau * loss_weight, so a rate that suits the student alone may be far
    too large with a teacher, if nothing normalises the activations. The warning is given if the student's own loss
    against the labels is more than a tenth above log C, the cost of guessing among C classes. Its mean over the log
    processor's window is read once, at the end of the first epoch. This is for students with one label per image (an
    mmpretrain head with ``num_classes``) and a cross-entropy of unmixed labels. ``tools/train.py`` adds this hook to a
    distillation.
    """

    def after_train_epoch(self, runner: Runner) -> None:
        if runner.epoch > 0 or _LOSS not in runner.message_hub.log_scalars:
            return
        model: Any = unwrapped_model(runner.model)
        classes, factor = _classes(model), getattr(model, 'student_loss_weight', 1)
        values, _ = runner.message_hub.log_scalars[_LOSS].data
        loss = float(values[-runner.log_processor.window_size :].mean()) / (factor or math.inf)
        if classes is None or not loss > _MARGIN * math.log(classes):
            return
        optimizer: Mapping = runner.cfg.optim_wrapper.get('optimizer') or {}
        runner.logger.warning(
            f"After the first epoch the student's own loss is {loss:.3g}, and guessing among {classes} classes costs "
            f'{math.log(classes):.3g}: it learns nothing from the labels. The soft labels make the gradient up to '
            f'{_growth(model):.3g} times as large. Divide optim_wrapper.optimizer.lr ({optimizer.get("lr")}) by that, '
            "or reduce the losses' loss_weight (docs/choosing.md)."
        )


def _classes(model: Any) -> int | None:
    """Return the number of classes of a student with a cross-entropy of unmixed labels, one per image, else None."""
    head = getattr(getattr(model, 'student', None), 'head', None)
    if (
        type(getattr(head, 'loss_module', None)).__name__ != 'CrossEntropyLoss'
        or getattr(model.data_preprocessor, 'batch_augments', None) is not None
        or 'MultiLabel' in type(head).__name__
    ):
        return None
    return predicted_classes(model)


def _growth(model: Any) -> float:
    """Return by how much, at most, soft labels multiply the gradient of the labels alone."""
    losses = getattr(getattr(model, 'distiller', None), 'distill_losses', {}).values()
    return 1 + sum(loss.loss_weight * loss.tau for loss in losses if hasattr(loss, 'tau'))
