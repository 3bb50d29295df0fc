"""Compare a finished run with its teacher and with the student alone, and list the next commands."""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmwsl.analysis.predict import network_config
from mmwsl.engine.cache_building import dataset_config
from mmwsl.utils.files import shown, whole_file
from mmwsl.utils.text import first_of

RECORD = 'result.json'
"""Name of the file that a finished run leaves in its work dir."""
_GAIN = 'gain'
_HOW_READ = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'sampler', 'dataset', 'collate_fn')
_SCHEDULE = ('val_evaluator', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr')


@dataclass(frozen=True)
class Result:
    """The figures of a finished run, in the unit of their metric."""

    setup: str
    """From :func:`setup`."""
    taught: bool
    seed: int | None
    name: str
    """Name of the figure."""
    last: float
    best: float
    best_at: int
    """Number of epochs or iterations after which the figure was best."""
    length: int
    """Length of the run, in epochs or iterations."""
    unit: str = 'epoch'
    """'epoch' or 'iteration'."""

    def save(self, work_dir: Path) -> None:
        """Write the record into a work dir."""
        with whole_file(work_dir / RECORD) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def setup(cfg: Config, processes: int = 1) -> str:
    """Return a hash of the student, its data and its schedule: equal for runs that differ only in teacher and seed.

    Args:
        cfg: Config of a distillation, or of a network alone.
        processes: Number of processes; the batch of all of them together counts.
    """
    validation = cfg.get('val_dataloader') or {}
    hooks = [hook for hook in cfg.get('custom_hooks') or () if not str(hook['type']).startswith('mmwsl.')]
    parts = [
        network_config(cfg),
        _data(cfg.train_dataloader, dataset_config(cfg)),
        processes,
        _data(validation, validation.get('dataset')),
        hooks,
        None if cfg.get('resume') else cfg.get('load_from'),
        {key: value for key, value in cfg.train_cfg.items() if not key.startswith('val_')},
        *(cfg.get(key) for key in _SCHEDULE),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _data(loader: Mapping, dataset: Any) -> dict[str, Any]:
    """Return the settings of a dataloader that decide what it reads, without those of how."""
    kept = {key: value for key, value in loader.items() if key not in _HOW_READ}
    return {**kept, 'dataset': dataset, 'shuffle': (loader.get('sampler') or {}).get('shuffle')}


def alone(result: Result, work_dir: Path) -> dict[Path, Result]:
    """Return the runs, in folders next to a work dir, that trained the same student alone, whatever their seeds."""
    found = {}
    for path in sorted(work_dir.resolve().parent.glob(f'*/{RECORD}')):
        try:
            other = Result(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # of a later version, or cut short by a full disk
            continue
        if not other.taught and (other.setup, other.name) == (result.setup, result.name):
            found[path.parent] = other
    return found


def gained(result: Result, work_dir: Path, teacher: tuple[float, str] | None, images: int) -> str:
    """Return lines that compare a run with its teacher and with its student alone.

    Args:
        result: The run's figures.
        work_dir: The run's; runs of the student alone are looked for next to it.
        teacher: The teacher's figure and a note on it, if known.
        images: Number of validation images.
    """
    unit = result.unit
    rows: list[tuple[str, float | None, str]] = [
        ('student' if result.taught else 'network', result.last, f'last {unit} ({result.length}), the one to compare'),
        ('', result.best, f'best {unit} ({result.best_at}), chosen on these validation data'),
    ]
    if result.taught:
        rows = [('teacher', *(teacher or (None, ''))), *rows, *_against_alone(result, alone(result, work_dir))]
    places = 2 if abs(result.last) > 1 else 3  # mmdet's figures are fractions, others percentages
    lines = [f'  {name:14}{_figure(name, value, places):>8}  {note}'.rstrip() for name, value, note in rows]
    return '\n'.join([f'{result.name} on {images:,} validation images:', *lines])


def _figure(name: str, value: float | None, places: int) -> str:
    return 'unknown' if value is None else f'{value:{"+" if name == _GAIN else ""}.{places}f}'


def _against_alone(result: Result, runs: Mapping[Path, Result]) -> Iterator[tuple[str, float | None, str]]:
    if not runs:
        yield 'student alone', None, 'no run of it with these data and this schedule in a folder next to this one'
        return
    mean = statistics.mean(run.last for run in runs.values())
    several = f'mean of {len(runs)} runs, ' if len(runs) > 1 else ''
    yield 'student alone', mean, f'last {result.unit}, {several}{first_of([shown(path) for path in runs])}'
    yield _GAIN, result.last - mean, 'student - student alone'


def commands(config: Path, checkpoint: Path, taught: bool) -> list[str]:
    """Return the commands that test and export what was trained; empty outside tools/train.py.

    Args:
        config: The run's config, as dumped with all options.
        checkpoint: The checkpoint of the last epoch.
        taught: Whether the run is a distillation; a network alone needs no export.
    """
    tools = Path(sys.argv[0]).parent
    wanted = [
        ('test.py', [config, checkpoint]),
        *([('model_converters/convert_kd_ckpt_to_student.py', [checkpoint])] if taught else []),
    ]
    return [
        shlex.join(['python', shown(tools / tool), *map(shown, files)])
        for tool, files in wanted
        if (tools / tool).is_file()
    ]
