from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from mmwsl.registry import HOOKS
from mmwsl.utils.text import first_of


@HOOKS.register_module()
class CheckResumeHook(Hook):
    """Refuse a checkpoint that is not of this run's model, from which mmengine would load what fits and train on.

    On ``--resume`` all parameters and buffers have to be there, in their shapes. With ``load_from`` the parts that
    differ, such as a head of another number of classes, stay as they are drawn, but something has to fit.
    ``tools/train.py`` adds this hook.

    Raises:
        ValueError: If the checkpoint does not fit; the first keys are named.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        expected: dict[str, Tensor] = model.state_dict()
        found = {key.removeprefix('module.'): value for key, value in checkpoint.get('state_dict', checkpoint).items()}
        misfits = sorted(key for key, value in expected.items() if not key.endswith('num_batches_tracked') and (
            key not in found or getattr(found[key], 'shape', None) != value.shape))
        if not misfits or (not runner._resume and len(misfits) < len(expected) // 2):
            return
        raise ValueError(
            f'the checkpoint is not of this model: {len(misfits)} of {len(expected)} tensors are missing there or of '
            f'another shape ({first_of(misfits)}). Is it of another config or work dir? To resume, '
            'give the config that the run was begun with; to start from a network of another shape, take parts of it '
            "with init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)")
