from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmwsl.engine.ratings import chosen_figure
from mmwsl.registry import HOOKS

_GREATER = [*CheckpointHook._default_greater_keys, 'f1', 'recall', 'iou', 'dice', 'score']


@HOOKS.register_module()
class BestCheckpointHook(CheckpointHook):
    """Keep mmengine's checkpoints and, as ``best_<figure>_epoch_<N>.pth``, the one that is best in validation.

    ``save_best='auto'``, the default here, follows the figure that counts for the task: mIoU, mAP or the F1 score if
    the metrics have one, else the first (top-1). mmengine's 'auto' always follows the first, which for a segmentor is
    the accuracy of pixels. The first of several equal epochs is kept. A run that is killed and resumed keeps the best
    of all its epochs. The choice is made on the validation data, so the best figure there is partly luck: compare
    methods by their last epochs. ``tools/train.py`` uses this hook instead of a ``CheckpointHook`` without
    ``save_best``; with ``default_hooks.checkpoint.save_best=None`` no best checkpoint is kept.

    Args:
        save_best: See mmengine's hook.
        rule: 'greater' or 'less', see mmengine's hook. None decides by the figure's name; if the name does not tell,
            no best checkpoint is kept, which is logged once.
        kwargs: See mmengine's hook.
    """

    def __init__(
        self, save_best: str | list[str] | None = 'auto', rule: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(save_best=save_best, rule=rule, **{'greater_keys': _GREATER, **kwargs})

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        if not hasattr(self, 'file_backend'):  # a validation outside training
            return
        if self.save_best == ['auto'] and self.key_indicators == ['auto'] and not self._choose(runner, metrics):
            return
        super().after_val_epoch(runner, metrics)

    def _choose(self, runner: Runner, metrics: Mapping[str, Any]) -> bool:
        """Settle which figure decides; return False if none does."""
        name = chosen_figure(metrics, runner)
        if name is None:
            return False
        try:
            self._init_rule(self.rules, [name])
        except ValueError:  # by a name like 'kappa' mmengine cannot tell whether more is better
            self.save_best = None
            runner.logger.warning(
                f'No best checkpoint is kept, since it is unknown whether more or less of {name} is better. Set '
                "default_hooks.checkpoint.rule='greater' or 'less'."
            )
            return False
        return True
