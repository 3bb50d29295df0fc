from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import load_what_fits, unwrapped_model
from mmwsl.utils.text import first_of

_MAY_DIFFER = ('resume =', 'load_from =', 'work_dir =', 'launcher =', 'experiment_name =')


@HOOKS.register_module()
class CheckResumeHook(Hook):
    """Refuse a checkpoint of another model, from which mmengine would load what fits and train on.

    On ``--resume``, all parameters and buffers must be in the file, in their shapes. With ``load_from``, tensors that
    do not fit, such as a head for another number of classes, keep their initial values, but at least half must fit.
    If a network or a part of one has ``init_cfg=dict(type='Pretrained', ...)``, at least half of its tensors must
    likewise come from that file. The SHA-256 of the teacher's files is kept in the checkpoint's ``meta`` and must be
    the same on ``--resume``, unless the config states ``model.teacher_sha256``, with which the files have been
    compared. Settings that differ from those of the checkpoint are logged. ``tools/train.py`` adds this hook.

    Raises:
        ValueError: If the file does not fit, with its first wrong keys, or the run had another teacher.
    """

    def __init__(self) -> None:
        self._initialised: dict[str, tuple[nn.Module, Mapping]] = {}

    def before_run(self, runner: Runner) -> None:
        self._initialised = dict(_pretrained(unwrapped_model(runner.model)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if known := getattr(unwrapped_model(runner.model), 'teacher_sha256', None):
            checkpoint['meta']['teacher_sha256'] = known

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._initialised = {}  # the checkpoint replaces what was initialised
        model = unwrapped_model(runner.model)
        if runner._resume:
            _compare_teachers(
                runner, checkpoint.get('meta', {}).get('teacher_sha256'), getattr(model, 'teacher_sha256', None)
            )
            _warn_of_other_settings(runner, checkpoint.get('meta', {}).get('cfg'))
        # through the wrapper, which gathers shards (FSDP 1: in the first process)
        expected: dict[str, Tensor] = {
            key.removeprefix('module.'): value for key, value in runner.model.state_dict().items()
        }
        found = {key.removeprefix('module.'): value for key, value in checkpoint.get('state_dict', checkpoint).items()}
        misfits = sorted(
            key
            for key, value in expected.items()
            if not key.endswith('num_batches_tracked')
            and (key not in found or getattr(found[key], 'shape', None) != value.shape)
        )
        if not misfits or (not runner._resume and len(misfits) < len(expected) // 2):
            return
        raise ValueError(
            f'the checkpoint is not of this model: {len(misfits)} of {len(expected)} tensors are missing there or of '
            f'another shape ({first_of(misfits)}). Is it of another config or work dir? To resume, '
            'give the config that the run was begun with; to start from a network of another shape, load parts of it '
            "with init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)"
        )

    def before_train(self, runner: Runner) -> None:
        for name, (module, init_cfg) in self._initialised.items():
            _check_initialised(name, module, init_cfg)


def _pretrained(module: nn.Module, name: str = 'model') -> Iterator[tuple[str, tuple[nn.Module, Mapping]]]:
    """Yield the modules that mmengine will initialise from files, with their settings; only outermost ones."""
    if getattr(module, 'is_init', False):
        return
    given = getattr(module, 'init_cfg', None) or []
    found = [
        init_cfg
        for init_cfg in ([given] if isinstance(given, Mapping) else given)
        if init_cfg.get('type') in ('Pretrained', PretrainedInit)
    ]
    if found:
        yield name, (module, found[-1])
        return
    for child_name, child in module.named_children():
        if hasattr(child, 'init_weights'):
            yield from _pretrained(child, f'{name}.{child_name}')


def _check_initialised(name: str, module: nn.Module, init_cfg: Mapping) -> None:
    """Raise ValueError if most values are not those of the file; keys may have been converted while loading."""
    checkpoint = CheckpointLoader.load_checkpoint(init_cfg['checkpoint'], map_location='cpu')
    weights = {
        key: value for key, value in checkpoint.get('state_dict', checkpoint).items() if isinstance(value, Tensor)
    }
    by_shape = defaultdict(list)
    for value in weights.values():
        by_shape[value.shape].append(value)
    own = {key: value.cpu() for key, value in module.state_dict().items() if not key.endswith('num_batches_tracked')}
    loaded = sum(
        any(torch.equal(value, other.to(value.dtype)) for other in by_shape[value.shape]) for value in own.values()
    )
    if loaded >= len(own) / 2:
        return
    prefix = init_cfg.get('prefix') or ''
    advice = _advice(module, own, weights, name) or "Give this network's own file, or leave init_cfg out"
    part = {
        key.removeprefix(prefix).removeprefix('.'): value for key, value in weights.items() if key.startswith(prefix)
    }
    raise ValueError(
        f'{name}.init_cfg: {init_cfg["checkpoint"]!r} is of another network: only {loaded} of {len(own)} '
        f'tensors came from it, and the others are untrained. {load_what_fits(module, part)}. {advice}'
    )


def _advice(module: nn.Module, own: Mapping, weights: Mapping, name: str) -> str:
    """Return how the file would fit, by a prefix or into a part of the network; '' if it would not."""
    prefixes = Counter(key[: -len(end)] for key in weights for end in _endings(key) if end in own)
    for prefix, count in prefixes.most_common(1):
        if count >= len(own) / 2:
            return f'It would fit with prefix={prefix!r} in init_cfg'
    for child, part in module.named_children():
        if len(part.state_dict().keys() & weights.keys()) >= len(weights) / 2:
            return f'It would fit as init_cfg of {name}.{child}'
    return ''


def _endings(key: str) -> list[str]:
    """Return what follows each dot of a key."""
    words = key.split('.')
    return ['.'.join(words[place:]) for place in range(1, len(words))]


def _warn_of_other_settings(runner: Runner, begun: str | None) -> None:
    """Log how a checkpoint's config differs from the run's, comparing text: a checkpoint's code must not be run."""

    def lines(text: str) -> dict[str, None]:
        return dict.fromkeys(line.strip(' ,') for line in text.splitlines() if not line.startswith(_MAY_DIFFER))

    before, now = lines(begun or ''), lines(runner.cfg.pretty_text)
    if begun and before != now:
        runner.logger.warning(
            'Settings differ from those of the checkpoint. Only here: '
            f'{first_of([line for line in now if line not in before]) or "nothing"}; only there: '
            f'{first_of([line for line in before if line not in now]) or "nothing"}.'
        )


def _compare_teachers(runner: Runner, begun: list[str] | None, current: list[str] | None) -> None:
    if not begun or not current or begun == current:
        return
    if runner.cfg.get('model', {}).get('teacher_sha256'):
        runner.logger.warning(f'The run was begun with another teacher, whose file has the SHA-256 {first_of(begun)}.')
        return
    raise ValueError(
        f'the run was begun with another teacher: the SHA-256 of its file is {first_of(begun)} in the '
        f'checkpoint and {first_of(current)} here. Put that file there again, or to continue with this one, '
        f'give --cfg-options model.teacher_sha256={current[0] if len(current) == 1 else current}'
    )
