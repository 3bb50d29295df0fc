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
    """Keep mmengine's checkpoints and, in ``best_<figure>_epoch_<N>.pth``, the one that validation liked best.

    ``save_best='auto'``, the default here, follows the figure that counts for the task: mIoU, mAP or the F1 score if
    the metrics have one, else the first (top-1). mmengine's 'auto' takes the first of all, which for a segmentor is the
    accuracy of pixels. The first of several equal epochs is kept. A run that is killed and resumed keeps the best of
    all its epochs. The file is chosen on the validation data, so its figure on them is too good by what chance gives:
    compare methods by their last epochs. ``tools/train.py`` puts this hook in the place of a ``CheckpointHook`` that
    has no ``save_best``; ``default_hooks.checkpoint.save_best=None`` leaves the best checkpoint out.

    Args:
        save_best: As of mmengine's hook.
        rule: As of mmengine's hook: 'greater' or 'less'. None: by the figure's name; of a name that tells neither,
            nothing is kept, which is logged once.
        kwargs: As of mmengine's hook.
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
        except ValueError:  # a name like 'kappa', of which mmengine cannot tell whether more is better
            self.save_best = None
            runner.logger.warning(
                f'No best checkpoint is kept: is more or less of {name} better? Set '
                "default_hooks.checkpoint.rule='greater' or 'less'."
            )
            return False
        return True
