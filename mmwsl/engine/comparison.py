"""Compare students: alone, with plain soft labels, with weighted ones; several seeds each, one teacher for all."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmwsl.compat import from_extra
from mmwsl.engine import runs
from mmwsl.engine.launch import read_config
from mmwsl.engine.runs import roughly
from mmwsl.utils.files import whole_file

ALONE, PLAIN, WEIGHTED = 'Student alone', 'Plain soft labels (KD)', 'Weighted soft labels (WSL)'
CACHE = 'teacher_cache'
_STYLES = 'k:o', 'C0--s', 'C1-^', 'C2-.v', 'C3-d', 'C4--x', 'C5-.p', 'C6:h'
_TOLD_EVERY = 30  # seconds


@dataclass(frozen=True)
class Metric:
    """What runs are compared by."""

    key: str
    """In their logs."""
    title: str
    factor: float = 1.0
    """To per cent."""

    def scores(self, log: Sequence[Mapping]) -> list[float]:
        """After each validation, in per cent."""
        return [self.factor * line[self.key] for line in log if self.key in line]


METRICS = (
    Metric('accuracy/top1', 'top-1, validation data, %'),
    Metric('mIoU', 'mIoU, validation data, %'),
    Metric('multi-label/mAP', 'mAP, validation data, %'),
    Metric('coco/bbox_mAP', 'mAP, validation data, %', 100.0),
)
"""Of which the first that a run logged is taken, if none is named."""


def metric_of(log: Sequence[Mapping]) -> Metric:
    """Return the metric of a log.

    Raises:
        ValueError: If it has none of :data:`METRICS`.
    """
    for metric in METRICS:
        if metric.scores(log):
            return metric
    raise ValueError(
        f'runs are compared by one of {", ".join(metric.key for metric in METRICS)}, and this one logged '
        f'{sorted(set().union(*log))}: set val_evaluator'
    )


@dataclass(frozen=True)
class Trained:
    """A run of a comparison: a config with a seed, in a folder of its own."""

    config: Path
    work_dir: Path
    options: tuple[str, ...]

    @property
    def epochs(self) -> int:
        return Config.fromfile(self.config).train_cfg.max_epochs

    @property
    def last_checkpoint(self) -> Path:
        return self.work_dir / f'epoch_{self.epochs}.pth'


@dataclass(frozen=True)
class Plan:
    """What a comparison trains."""

    teacher: Trained
    """Nothing is trained if ``teacher_ckpt`` is there."""
    teacher_ckpt: str | None
    """File of a teacher that is there already, or None."""
    taught: Path
    """A distillation, whose config has the teacher."""
    teaching: tuple[str, ...]
    """Settings that give it the teacher."""
    arms: dict[str, list[Trained]]
    """Runs by name, in the order of the seeds."""


def plan(
    paths: Sequence[Path], out: Path, seeds: Sequence[int], options: Sequence[str] = (), cached: bool = False
) -> Plan:
    """Plan the comparison of some configs.

    A network alone that is the distillations' teacher is no arm, but trains it. If there is a single config, a
    distillation, it is compared with its student alone and, if its loss is WSL's, with the same loss without weights;
    their configs are written to ``out``.

    Args:
        paths: Configs, or folders of them.
        out: Folder for the runs.
        seeds: Of each arm's runs.
        options: Settings for all of them, ``key=value``.
        cached: Whether distillations read the teacher's answers from ``out/teacher_cache``.

    Raises:
        FileNotFoundError: If a config is not there.
        ValueError: If no config distils, or they have several teachers.
    """
    configs = {path: read_config(str(path)) for path in _files(paths)}
    taught = [path for path, cfg in configs.items() if 'teacher' in cfg.model]
    if not taught:
        raise ValueError(
            f'one of the configs should be a distillation, such as configs/wsl_digits.py; {len(configs)} '
            f'were given that train a network alone ({", ".join(map(str, configs))}). Name one'
        )
    model = configs[taught[0]].model
    for path in taught:
        if [configs[path].model[key] for key in ('teacher', 'teacher_ckpt')] != [model.teacher, model.teacher_ckpt]:
            raise ValueError(
                f'configs are compared with one teacher, and model.teacher or teacher_ckpt of {path} '
                f'differ from those of {taught[0]}. Give all of them the same, or compare them apart'
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
    """Return a config, written to ``out``, and settings with which a test is one of the validation data."""
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
    """Whether a network alone is the teacher: its run writes the teacher's file, or it is the teacher's network and not
    the student's; how it begins does not matter.
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
    """Write the configs of the student alone and, beside WSL, of plain soft labels."""
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
    """What arms are called: by what they are, if that is clear, otherwise by their files."""
    names = [
        ALONE if path not in taught else {'kd': PLAIN, 'wsl': WEIGHTED}.get(path.stem.partition('_')[0], path.stem)
        for path in arms
    ]
    return {name if names.count(name) == 1 else path.stem: path for name, path in zip(names, arms, strict=True)}


def train_all(
    tool: Path,
    planned: Sequence[Trained],
    jobs: int,
    threads: int,
    tell: Callable[[str], None],
    every: float = _TOLD_EVERY,
) -> list[list[dict]]:
    """Train what is not trained yet, several runs at a time, and return the logs in the order of the runs.

    Args:
        tool: tools/train.py.
        planned: The runs; those that are finished in their folders are not repeated, killed ones go on.
        jobs: Runs at a time.
        threads: Of each, on a CPU.
        tell: Is told of each run that ends, and from time to time how far all are.
        every: Seconds between the latter.

    Raises:
        RuntimeError: If a run fails; those that run beside it end first, and the others do not begin.
        ValueError: If a folder holds another run.
    """
    progress = _Progress(planned)  # a mistake in the last config must not wait for the runs before it
    versions = [runs.version_of(run.config) for run in planned]
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future, int] = {
            pool.submit(runs.train, tool, run.config, run.work_dir, run.options, threads, version): number
            for number, (run, version) in enumerate(zip(planned, versions, strict=True))
        }
        try:
            for future in _as_they_end(running, every, lambda: progress.tell(tell)):
                if future.result():
                    progress.tell(tell, f'{planned[running[future]].work_dir.name} is trained')
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [runs.scalars(run.work_dir) for run in planned]


def _as_they_end(running: Mapping[Future, int], every: float, meanwhile: Callable[[], None]) -> Iterator[Future]:
    left = set(running)
    while left:
        ended, left = wait(left, timeout=every, return_when=FIRST_COMPLETED)
        if not ended:
            meanwhile()
        yield from ended


class _Progress:
    """How many epochs are done, and how long the others may take."""

    def __init__(self, planned: Sequence[Trained]) -> None:
        self.planned, self.total = planned, sum(run.epochs for run in planned)
        self.begin, self.before = time.monotonic(), self._done()
        self.told = ''

    def _done(self) -> int:
        return sum(1 for run in self.planned for line in runs.scalars(run.work_dir) if 'epoch' not in line)

    def tell(self, tell: Callable[[str], None], ended: str = '') -> None:
        """Tell what has changed: that a run ended, or that epochs did."""
        line = self.line()
        epochs = line.partition(',')[0]
        if ended or epochs != self.told:
            tell(f'{ended}, {line}' if ended else line)
        self.told = epochs

    def line(self) -> str:
        done = self._done()
        now = done - self.before  # since this command was given
        seconds = time.monotonic() - self.begin
        left = f', about {roughly(seconds * (self.total - done) / now)} left' if now > 0 and done < self.total else ''
        return f'{done} of {self.total} epochs{left}'


def table(metric: Metric, teacher: float, logs: Mapping[str, Sequence[Sequence[Mapping]]]) -> str:
    """Return the table of a comparison: of each arm the mean of the last epochs, their deviation and each run's.

    Args:
        metric: By which the runs are compared.
        teacher: Its score, in per cent.
        logs: Of each arm's runs.
    """
    lines = [f'{metric.title:30}   mean +- std   runs', f'{"Teacher":30} {teacher:6.2f}']
    for arm, of_arm in logs.items():
        last = [metric.scores(log)[-1] for log in of_arm]
        spread = f'{statistics.stdev(last):5.2f}' if len(last) > 1 else '    -'
        lines.append(
            f'{arm:30} {statistics.mean(last):6.2f} +- {spread}   {", ".join(f"{value:.2f}" for value in last)}'
        )
    return '\n'.join(lines)


def warning(metric: Metric, teacher: float, logs: Mapping[str, Sequence[Sequence[Mapping]]]) -> str:
    """Return why a comparison says little: a teacher that is no better than the student alone; '' if it is better."""
    alone = [metric.scores(log)[-1] for log in logs.get(ALONE, ())]
    if not alone or teacher > statistics.mean(alone):
        return ''
    return (
        f'The teacher ({teacher:.2f}) is no better than the student alone ({statistics.mean(alone):.2f}), so there '
        'is little to learn from it. Train it for longer, or use a larger one or one with a pretrained start.'
    )


def best_taught(metric: Metric, planned: Plan, logs: Mapping[str, Sequence[Sequence[Mapping]]]) -> Trained:
    """Return the distillation whose last epoch has the best score."""
    runs = [
        (metric.scores(log)[-1], run)
        for arm, of_arm in planned.arms.items()
        for run, log in zip(of_arm, logs[arm], strict=True)
        if 'teacher' in Config.fromfile(run.config).model
    ]
    return max(runs, key=lambda scored: scored[0])[1]


def draw(metric: Metric, teacher: float, logs: Mapping[str, Sequence[Sequence[Mapping]]], path: Path) -> None:
    """Draw the arms' scores over the epochs and, if a run logged them, WSL's mean weights."""
    with from_extra('demo'):
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot as plt
    weighted = {arm: of_arm for arm, of_arm in logs.items() if any(_weights(log)[0] for log in of_arm)}
    figure, axes = plt.subplots(
        1, 1 + bool(weighted), figsize=(5 + 5 * bool(weighted), 4), layout='constrained', squeeze=False
    )
    for number, (arm, of_arm) in enumerate(logs.items()):
        _draw_scores(axes[0, 0], _STYLES[number % len(_STYLES)], arm, metric, of_arm)
    seeds = max(map(len, logs.values()))
    axes[0, 0].axhline(teacher, color='grey', label='Teacher')
    axes[0, 0].set(xlabel='epoch', ylabel=metric.title, title=f'Mean and range, seeds: {seeds}')
    axes[0, 0].legend()
    if weighted:
        _draw_weights(axes[0, 1], weighted)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_scores(axis: Any, style: str, arm: str, metric: Metric, of_arm: Sequence[Sequence[Mapping]]) -> None:
    curves = [metric.scores(log) for log in of_arm]
    epochs = [line['step'] for line in of_arm[0] if metric.key in line]
    each = list(zip(*curves, strict=True))
    (line,) = axis.plot(epochs, [statistics.mean(values) for values in each], style, label=arm)
    axis.fill_between(
        epochs, [min(values) for values in each], [max(values) for values in each], color=line.get_color(), alpha=0.15
    )


def _draw_weights(axis: Any, weighted: Mapping[str, Sequence[Sequence[Mapping]]]) -> None:
    for arm, of_arm in weighted.items():
        for seed, log in enumerate(of_arm):
            name = f'seed {seed}' if len(weighted) == 1 else f'{arm}, seed {seed}'
            axis.plot(*_weights(log), marker='.', label=name)
    axis.set(xlabel='epoch', ylabel='mean weight w', title='WSL: how far the soft labels are trusted', ylim=(0, 1.02))
    axis.legend()


def _weights(log: Sequence[Mapping]) -> tuple[list[int], list[float]]:
    """Return each epoch with its last logged mean weight."""
    last = {line['epoch']: line['distill.wsl_weight'] for line in log if 'distill.wsl_weight' in line}
    return list(last), list(last.values())
