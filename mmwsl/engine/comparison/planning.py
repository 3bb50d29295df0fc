"""Plan a comparison: which configs are its arms, and which one trains the teacher."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmwsl.engine.launch import read_config
from mmwsl.utils.files import whole_file

ALONE, PLAIN, WEIGHTED = 'Student alone', 'Plain soft labels (KD)', 'Weighted soft labels (WSL)'
CACHE = 'teacher_cache'


@dataclass(frozen=True)
class Trained:
    """A run of a comparison: a config with a seed, in a folder of its own."""

    config: Path
    work_dir: Path
    options: tuple[str, ...]

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of its last epoch."""
        return self.work_dir / f'epoch_{epochs_of(self.config)}.pth'


def epochs_of(config: Path) -> int:
    """Return how many epochs a config trains."""
    return Config.fromfile(config).train_cfg.max_epochs


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison."""

    teacher: Trained
    """Trained first, unless ``teacher_ckpt`` is given."""
    teacher_ckpt: str | None
    """File of a teacher that is trained already, or None."""
    taught: Path
    """Config of a distillation, from which the teacher's config is read."""
    teaching: tuple[str, ...]
    """Its settings, with the teacher's file."""
    arms: dict[str, list[Trained]]
    """Runs by name, in the order of the seeds."""


def plan(
    paths: Sequence[Path], out: Path, seeds: Sequence[int], options: Sequence[str] = (), cached: bool = False
) -> Plan:
    """Return the runs that compare some configs.

    The config of a network alone that equals the teacher trains the teacher, and is no arm. A single distillation is
    compared with its student alone and, if its loss is WSLLoss, with the same loss without weights; the configs of
    these are written to ``out``.

    Args:
        paths: Configs, or folders of them.
        out: Folder for the runs.
        seeds: Seeds of each arm's runs.
        options: Settings of all runs, ``key=value``.
        cached: Whether distillations read the teacher's answers from ``out/teacher_cache``.

    Raises:
        FileNotFoundError: If a config does not exist.
        ValueError: If no config distils, or they have several teachers.
    """
    configs = {path: read_config(str(path)) for path in _files(paths)}
    taught = [path for path, cfg in configs.items() if 'teacher' in cfg.model]
    if not taught:
        raise ValueError(
            'one of the configs should be a distillation. Add one, such as configs/wsl_digits.py, to these that train '
            f'a network alone: {", ".join(map(str, configs))}'
        )
    model = configs[taught[0]].model
    for path in taught:
        if [configs[path].model[key] for key in ('teacher', 'teacher_ckpt')] != [model.teacher, model.teacher_ckpt]:
            raise ValueError(
                f'the configs should have one teacher, but model.teacher or teacher_ckpt of {path} differ from those '
                f'of {taught[0]}. Give them the same, or compare them separately'
            )
    alone = [path for path in configs if path not in taught]
    teachers = [path for path in alone if _is_teacher(configs[path], model)]
    students = [path for path in alone if path not in teachers]
    if len(configs) - len(teachers) == 1:
        derived = _derive(taught[0], model, out)
        students, taught = derived[:1], [*derived[1:], *taught]
    teacher = Trained(
        teachers[0] if teachers else _derived(out, taught[-1], 'teacher', _ALONE.format('teacher')),
        out / 'teacher',
        ('randomness.seed=0', *options),
    )
    ckpt = model.get('teacher_ckpt')
    there = not ckpt or '://' in ckpt or (Path(ckpt).is_file() and not _is_run_in(Path(ckpt), teacher.work_dir))
    given = () if there else (f'model.teacher_ckpt={os.path.relpath(teacher.last_checkpoint)}',)
    read = _cache_options(out / CACHE) if cached else ()
    arms = {
        name: [
            Trained(
                path,
                out / f'{path.stem}_seed{seed}',
                (f'randomness.seed={seed}', *options, *((*given, *read) if path in taught else ())),
            )
            for seed in seeds
        ]
        for name, path in _named([*students, *taught], taught).items()
    }
    return Plan(teacher, ckpt if there else None, taught[-1], (*options, *given), arms)


_ALONE = 'model = dict(_delete_=True, **_base_.model.{})'


def on_validation_data(config: Path, options: Sequence[str], out: Path) -> tuple[Path, list[str]]:
    """Write a config that tests on the validation data to ``out``; return it and its settings."""
    same = 'test_dataloader = dict(_delete_=True, **_base_.val_dataloader)\ntest_evaluator = _base_.val_evaluator'
    own = [option.replace('val_', 'test_', 1) for option in options if option.startswith('val_')]
    return _derived(out, config, 'on_validation_data', same), [*options, *own]


def without_spaces(path: str) -> str:
    """Return a path that a setting can hold: mmengine drops spaces and splits at commas."""
    return re.sub(r'[\s,]+', '_', path)


def _cache_options(cache: Path) -> tuple[str, ...]:
    folder, dataset = os.path.relpath(cache), 'train_dataloader.dataset'
    return f'model.teacher_cache={folder}', f'{dataset}.type=mmwsl.CachedViews', f'{dataset}.cache={folder}'


def _files(paths: Sequence[Path]) -> list[Path]:
    found = [file for path in paths for file in (sorted(path.glob('*.py')) if path.is_dir() else [path])]
    missing = [path for path in (*found, *paths) if not path.exists()]
    if missing or not found:
        raise FileNotFoundError(
            f'there is no config {(missing or list(paths))[0]}: give a config, or a folder of '
            'configs as tools/new_pair.py writes it'
        )
    return list(dict.fromkeys(found))


def _is_teacher(alone: Mapping, model: Mapping) -> bool:
    """Whether a network alone is the teacher: its run writes the teacher's file, or it has the teacher's network.

    That must not be the student's network, too. Initial weights do not matter.
    """
    writes = alone.get('work_dir') and Path(alone['work_dir']) == Path(model.get('teacher_ckpt') or '').parent
    return bool(writes) or _network(alone['model']) == _network(model['teacher']) != _network(model['architecture'])


def _network(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {
        key: _network(value)
        for key, value in config.items()
        if key not in ('init_cfg', 'pretrained', 'pretrained_cfg_overlay', '_scope_')
    }


def _is_run_in(checkpoint: Path, work_dir: Path) -> bool:
    return checkpoint.resolve().parent == work_dir.resolve() and (work_dir / 'run.json').exists()


def _derive(config: Path, model: Mapping, out: Path) -> list[Path]:
    """Write the configs of the student alone and, if there is a WSLLoss, of plain soft labels."""
    losses = (model.get('distiller') or {}).get('distill_losses') or {}
    weighted = [name for name, loss in losses.items() if str(loss['type']).endswith('WSLLoss')]
    derived = [_derived(out, config, 'alone', _ALONE.format('architecture'))]
    if weighted:
        ones = ', '.join(f"{name}=dict(weighting='one')" for name in weighted)
        derived.append(_derived(out, config, 'kd', f'model = dict(distiller=dict(distill_losses=dict({ones})))'))
    return derived


def _derived(out: Path, config: Path, name: str, text: str) -> Path:
    path = out / 'configs' / f'{name}.py'
    with whole_file(path) as file:
        file.write(f'_base_ = [{config.resolve().as_posix()!r}]\n\n{text}\n'.encode())
    return path


def _named(arms: Sequence[Path], taught: Sequence[Path]) -> dict[str, Path]:
    """Name arms by their kind if that is unique, otherwise by their files."""
    names = [
        ALONE if path not in taught else {'kd': PLAIN, 'wsl': WEIGHTED}.get(path.stem.partition('_')[0], path.stem)
        for path in arms
    ]
    return {name if names.count(name) == 1 else path.stem: path for name, path in zip(names, arms, strict=True)}
