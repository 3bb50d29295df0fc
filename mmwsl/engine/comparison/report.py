"""Report a comparison: the metric, the table, a warning and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmwsl.engine.comparison.planning import ALONE, Plan, Trained
from mmwsl.utils.pictures import pyplot

_STYLES = 'k:o', 'C0--s', 'C1-^', 'C2-.v', 'C3-d', 'C4--x', 'C5-.p', 'C6:h'


@dataclass(frozen=True)
class Metric:
    """A figure that runs are compared by."""

    key: str
    """Its name in the logs."""
    title: str
    factor: float = 1.0
    """Factor that converts it to per cent."""

    def scores(self, log: Sequence[Mapping]) -> list[float]:
        """Return the figure after each validation, in per cent."""
        return [self.factor * line[self.key] for line in log if self.key in line]


METRICS = (
    Metric('accuracy/top1', 'top-1, validation data, %'),
    Metric('mIoU', 'mIoU, validation data, %'),
    Metric('multi-label/mAP', 'mAP, validation data, %'),
    Metric('coco/bbox_mAP', 'mAP, validation data, %', 100.0),
)
"""The figures that runs can be compared by; the first that a run has logged is used."""


def metric_of(log: Sequence[Mapping]) -> Metric:
    """Return the first of :data:`METRICS` that a log has.

    Raises:
        ValueError: If it has none of them.
    """
    for metric in METRICS:
        if metric.scores(log):
            return metric
    raise ValueError(
        f'a run should log one of {", ".join(metric.key for metric in METRICS)} to be compared. Set val_evaluator; '
        f'this one logged {sorted(set().union(*log))}'
    )


def table(metric: Metric, teacher: float, logs: Mapping[str, Sequence[Sequence[Mapping]]]) -> str:
    """Return a table of each arm's scores in the last epoch: mean, standard deviation and each run's.

    Args:
        metric: The figure to compare.
        teacher: The teacher's score, in per cent.
        logs: Logs of each arm's runs.
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
    """Return a warning if the teacher is no better than the student alone, otherwise ''."""
    alone = [metric.scores(log)[-1] for log in logs.get(ALONE, ())]
    if not alone or teacher > statistics.mean(alone):
        return ''
    return (
        f'The teacher ({teacher:.2f}) is no better than the student alone ({statistics.mean(alone):.2f}), so there '
        'is little to learn from it. Train it for longer, or use a larger one, or one that starts from pretrained '
        'weights.'
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
    """Draw the scores of each arm by epoch and, if a run logged them, WSL's mean weights."""
    plt = pyplot()
    weighted = {arm: of_arm for arm, of_arm in logs.items() if any(set(_weights(log)[1]) - {1.0} for log in of_arm)}
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
    """Draw a line for each run: of one arm in colours by seed, of several in a colour for each arm."""
    for number, (arm, of_arm) in enumerate(weighted.items()):
        for seed, log in enumerate(of_arm):
            if len(weighted) == 1:
                color, label = f'C{seed}', f'seed {seed}'
            else:
                color, label = f'C{number}', '' if seed else arm
            axis.plot(*_weights(log), marker='.', color=color, label=label)
    axis.set(xlabel='epoch', ylabel='mean weight w', title='WSL: how far the soft labels are trusted', ylim=(0, 1.02))
    axis.legend()


def _weights(log: Sequence[Mapping]) -> tuple[list[int], list[float]]:
    """Return each epoch with its last logged mean weight."""
    last = {line['epoch']: line['distill.wsl_weight'] for line in log if 'distill.wsl_weight' in line}
    return list(last), list(last.values())
