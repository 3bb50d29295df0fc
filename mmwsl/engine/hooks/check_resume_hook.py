from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from mmwsl.registry import HOOKS
from mmwsl.utils.text import first_of

_MAY_DIFFER = ('resume =', 'load_from =', 'work_dir =', 'launcher =', 'experiment_name =')


@HOOKS.register_module()
class CheckResumeHook(Hook):
    """Refuse a checkpoint that is not of this run's model, from which mmengine would load what fits and train on.

    On ``--resume`` all parameters and buffers have to be there, in their shapes. With ``load_from`` the parts that
    differ, such as a head of another number of classes, stay as they are drawn, but something has to fit.
    The SHA-256 of the teacher's files is kept in the checkpoint's ``meta`` and has to be the same on ``--resume``,
    unless the config states ``model.teacher_sha256``, with which the files have been compared. Settings that differ
    from those of the checkpoint are named in the log. ``tools/train.py`` adds this hook.

    Raises:
        ValueError: If the checkpoint does not fit, in which case the first keys are named, or is of another teacher.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if known := getattr(_unwrapped(runner.model), 'teacher_sha256', None):
            checkpoint['meta']['teacher_sha256'] = known

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        model = _unwrapped(runner.model)
        if runner._resume:
            _compare_teachers(runner, checkpoint.get('meta', {}).get('teacher_sha256'),
                              getattr(model, 'teacher_sha256', None))
            _warn_of_other_settings(runner, checkpoint.get('meta', {}).get('cfg'))
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


def _unwrapped(model: Any) -> Any:
    return model.module if is_model_wrapper(model) else model


def _warn_of_other_settings(runner: Runner, begun: str | None) -> None:
    """Compare two configs line by line, as text: the one in a checkpoint is not to be run."""
    def lines(text: str) -> dict[str, None]:
        return dict.fromkeys(line.strip(' ,') for line in text.splitlines() if not line.startswith(_MAY_DIFFER))
    before, now = lines(begun or ''), lines(runner.cfg.pretty_text)
    if begun and before != now:
        runner.logger.warning(
            'Settings differ from those of the checkpoint. Only here: '
            f'{first_of([line for line in now if line not in before]) or "nothing"}; only there: '
            f'{first_of([line for line in before if line not in now]) or "nothing"}.')


def _compare_teachers(runner: Runner, begun: list[str] | None, current: list[str] | None) -> None:
    if not begun or not current or begun == current:
        return
    if runner.cfg.get('model', {}).get('teacher_sha256'):
        runner.logger.warning(f"The run was begun with another teacher, whose file has the SHA-256 {first_of(begun)}.")
        return
    raise ValueError(f"the run was begun with another teacher: the SHA-256 of its file is {first_of(begun)} in the "
                     f'checkpoint and {first_of(current)} here. Put that file there again, or to go on with this one, '
                     f'give --cfg-options model.teacher_sha256={current[0] if len(current) == 1 else current}')
