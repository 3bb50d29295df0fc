"""Write the tables and pictures of docs/choosing.md, and README.md's table, from results/runs.jsonl."""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catalogue import ROOT, Seeds, difference, each, mean_and_spread, read_runs, telling_options
from questions import (
    FEW,
    HALF,
    KD,
    KD_PLAIN,
    LOSSES,
    NOISE,
    STEP,
    TEACHER_LOSS,
    Found,
    draw_methods,
    methods_table,
    weight_table,
    wrong_table,
)

from mmwsl.utils import whole_file
from mmwsl.utils.text import table, with_table
from mmwsl.utils.pictures import pyplot

PAGE = ROOT / 'docs/choosing.md'
README = ROOT / 'README.md'
PICTURES = ROOT / 'docs/pictures'
TAUS, WEIGHTS = ('1', '2', '4', '8'), ('0.5', '1', '2.25', '4')
SCALES = {'1': ('kd', ('0.9', '2.25', '4.5', '9')), '0.1': ('kd-hinton', ('0.9', '9'))}
"""Config and weights of the soft loss, by the weight of the hard loss."""
LOSS = 'model.distiller.distill_losses.loss_wsl'
LONGER = frozenset({'train_cfg.max_epochs': '40', 'param_scheduler.milestones': '[25,30,35]', **HALF}.items())
NOISES = ('0', '0.2', '0.4')
ARMS = {'alone': 'Alone', 'kd': 'Plain soft labels', 'wsl': 'Weighted soft labels'}
EMPTY = 'not run yet'
Arms = dict[str, Seeds]


@dataclass(frozen=True)
class Data:
    """A dataset, the configs of its pair, and what every run on it sets."""

    title: str
    alone: str
    pair: str
    weak_pair: str
    teacher: str
    weak_teacher: str
    grid: str
    settings: tuple[tuple[str, str], ...] = ()

    def configs(self, pair: str, suffix: str = '') -> dict[str, str]:
        return {'alone': self.alone + suffix, 'kd': f'kd_{pair}{suffix}', 'wsl': f'wsl_{pair}{suffix}'}


DATA = (
    Data(
        'Digits',
        'digits_student',
        'digits',
        'digits_student_student',
        'ResNet-14',
        'ResNet-8, as the student',
        'wsl_digits',
    ),
    Data(
        'CIFAR-100, 10,000 images',
        'r20_cifar100_8e',
        'r56_r20_cifar100_8e',
        'r20_r20_cifar100_8e',
        'ResNet-56',
        'ResNet-20, as the student',
        'wsl_r56_r20_cifar100_8e_eval_cached',
        tuple(FEW.items()),
    ),
)


class Runs:
    """Finds runs that are kept, by config and settings."""

    def __init__(self, runs: Iterable[dict]) -> None:
        self.runs: dict[tuple[str, frozenset], Seeds] = {}
        for run in runs:
            settings = {**run['settings'], **dict(option.split('=', 1) for option in telling_options(run))}
            self.runs.setdefault((run['config'], frozenset(settings.items())), {})[run['seed']] = run

    def of(self, config: str, data: Data, **settings: str) -> Seeds:
        """Return the runs of a config with these settings, by seed."""
        return self.runs.get((config, frozenset({**dict(data.settings), **settings}.items())), {})


def grid(runs: Runs, data: Data) -> dict[tuple[str, str], Seeds]:
    """Return the runs at each tau and loss_weight."""
    return {
        (tau, weight): runs.of(data.grid, data, **{f'{LOSS}.tau': tau, f'{LOSS}.loss_weight': weight})
        for tau in TAUS
        for weight in WEIGHTS
    }


def noisy(runs: Runs, data: Data) -> dict[str, Arms]:
    """Return the runs of each arm at each share of wrong labels."""
    found = {'0': three_arms(runs, data)}
    for prob in NOISES[1:]:
        found[prob] = {
            arm: runs.of(config, data, **{NOISE: prob}) for arm, config in data.configs(data.pair, '_noise').items()
        }
    return found


def teachers(runs: Runs, data: Data) -> dict[str, Arms]:
    """Return the runs of each arm with each teacher."""
    return {
        name: {arm: runs.of(config, data) for arm, config in data.configs(pair).items()}
        for name, pair in ((data.teacher, data.pair), (data.weak_teacher, data.weak_pair))
    }


def cell(runs: Seeds) -> str:
    return mean_and_spread(list(runs.values())) or EMPTY


def grid_table(runs: Runs) -> str:
    rows = []
    for data in DATA:
        cells = grid(runs, data)
        for tau in TAUS:
            row = [cells[tau, weight] for weight in WEIGHTS]
            counts = ', '.join(str(len(seeds)) for seeds in row)
            rows.append((data.title, tau, *map(cell, row), mean_of_means(row), counts))
    return table(('Data', '`tau`', *(f'`loss_weight` {weight}' for weight in WEIGHTS), 'Mean', 'Runs'), rows)


def mean_of_means(cells: list[Seeds]) -> str:
    return f'{statistics.mean(moments(runs)[0] for runs in cells):.2f}' if all(cells) else ''


def arms_table(question: str, rows: Iterable[tuple[str, str, Arms]]) -> str:
    columns = ('Data', question, *ARMS.values(), 'Plain - alone', 'Weighted - plain', 'Runs')
    return table(columns, [(title, case, *arms_row(arms)) for title, case, arms in rows])


def arms_row(arms: Arms) -> tuple[str, ...]:
    return (
        *(cell(arms[arm]) for arm in ARMS),
        difference(arms['kd'], arms['alone']),
        difference(arms['wsl'], arms['kd']),
        ', '.join(str(len(arms[arm])) for arm in ARMS),
    )


def random_table(runs: Runs) -> str:
    """Return a table that shows, if many labels are wrong, whether it matters which image gets which weight."""
    arms = noisy(runs, DATA[1])[NOISES[-1]]
    handed_out = runs.of(
        DATA[1].configs(DATA[1].pair, '_noise')['wsl'], DATA[1], **{NOISE: NOISES[-1], f'{LOSS}.weighting': 'random'}
    )
    rows = [
        (ARMS['kd'], arms['kd']),
        (ARMS['wsl'], arms['wsl']),
        ('The same weights, assigned at random', handed_out),
    ]
    return table(
        ('Soft labels', 'Top-1', 'Minus plain', 'Each run'),
        [
            (name, cell(seeds), difference(seeds, arms['kd']) if seeds is not arms['kd'] else '', each(seeds.values()))
            for name, seeds in rows
        ],
    )


def scale_table(runs: Runs) -> str:
    """Return a table of what plain soft labels gain from the weights of both losses alone, against the first row."""
    cells = {
        (hard, alpha): runs.of(f'{config}_r56_r20_cifar100_8e', DATA[1], **{KD: alpha})
        for hard, (config, alphas) in SCALES.items()
        for alpha in alphas
    }
    (hard, alpha), first = next(iter(cells.items()))
    return table(
        ('Hard loss', '`loss_weight`', 'Top-1', f'Minus {hard} and {alpha}', 'Each run'),
        [
            (*weights, cell(seeds), difference(seeds, first) if seeds is not first else '', each(seeds.values()))
            for weights, seeds in cells.items()
        ],
    )


def longer(runs: Runs) -> Arms:
    """Return the runs of the paper's recipe in a sixth of its epochs, in bfloat16."""
    return {
        name: runs.runs.get((f'{config}_cifar100', LONGER), {})
        for name, config in {
            'Alone': 'r20',
            "Plain soft labels, the field's recipe": 'kd-hinton_r56_r20',
            'Plain soft labels': 'kd_r56_r20',
            'Weighted soft labels': 'wsl_r56_r20',
        }.items()
    }


def longer_table(runs: Runs) -> str:
    found = longer(runs)
    plain = found['Plain soft labels']
    return table(
        ('Soft labels', 'Top-1', 'Minus plain', 'Each run'),
        [
            (name, cell(seeds), difference(seeds, plain) if seeds is not plain else '', each(seeds.values()))
            for name, seeds in found.items()
        ],
    )


def tables(runs: Runs) -> dict[str, str]:
    """Return all tables by the names of their places in the page."""
    found = Found(runs.runs)
    return {
        'step': methods_table(found, STEP, KD_PLAIN),
        'losses': methods_table(found, LOSSES, KD_PLAIN),
        'sources': methods_table(found, TEACHER_LOSS, KD_PLAIN),
        'weight': weight_table(found),
        'wrong': wrong_table(found),
        'grid': grid_table(runs),
        'teachers': arms_table(
            'Teacher', ((data.title, name, arms) for data in DATA for name, arms in teachers(runs, data).items())
        ),
        'noise': arms_table(
            'Wrong labels',
            ((data.title, f'{float(prob):.0%}', arms) for data in DATA for prob, arms in noisy(runs, data).items()),
        ),
        'random': random_table(runs),
        'scale': scale_table(runs),
        'longer': longer_table(runs),
    }


def gain_table(runs: Runs) -> str:
    """Return README.md's table: the student alone, with plain and with weighted soft labels, on each kind of data."""
    digits, few = DATA
    whole = replace(few, settings=())
    found = {
        'CIFAR-100, ResNet-56 -> ResNet-20, 8 epochs': three_arms(runs, whole),
        'the same, 40 epochs': {arm: longer(runs)[name] for arm, name in ARMS.items()},
        'the same, 10,000 images with 40 % wrong labels, 8 epochs': noisy(runs, few)[NOISES[-1]],
        '600 digits, ResNet-14 -> ResNet-8, 10 epochs': three_arms(runs, digits),
    }
    rows = [
        (name, *(cell(seeds[arm]) for arm in ARMS), ', '.join(sorted({str(len(seeds[arm])) for arm in ARMS})))
        for name, seeds in found.items()
    ]
    return table(('Data and networks', *ARMS.values(), 'Runs each'), rows)


def three_arms(runs: Runs, data: Data) -> Arms:
    return {arm: runs.of(config, data) for arm, config in data.configs(data.pair).items()}


def pages(runs: Runs) -> dict[Path, str]:
    """Return the texts of docs/choosing.md and README.md, with their tables updated."""
    text = PAGE.read_text()
    for name, made in tables(runs).items():
        text = with_table(text, name, 'results/choosing', made)
    return {PAGE: text, README: with_table(README.read_text(), 'gain', 'results/choosing', gain_table(runs))}


def draw(runs: Runs) -> None:
    """Draw choosing_methods.png; choosing_grid.png and choosing_noise.png have a panel for each dataset with runs."""
    draw_methods(Found(runs.runs), PICTURES / 'choosing_methods.png')
    panel(
        'choosing_grid.png',
        'temperature tau',
        [
            (data.title, TAUS, {f'loss_weight {weight}': [cells[tau, weight] for tau in TAUS] for weight in WEIGHTS})
            for data in DATA
            for cells in [grid(runs, data)]
        ],
    )
    panel(
        'choosing_noise.png',
        'share of wrong labels',
        [
            (data.title, NOISES, {name: [cells[prob][arm] for prob in NOISES] for arm, name in ARMS.items()})
            for data in DATA
            for cells in [noisy(runs, data)]
        ],
    )


def panel(name: str, xlabel: str, panels: list[tuple[str, tuple[str, ...], dict[str, list[Seeds]]]]) -> None:
    """Draw each line's means and standard deviations, in the panels whose cells are all filled.

    A single run is an open mark without a bar.
    """
    plt = pyplot()
    panels = [panel for panel in panels if all(cell for line in panel[2].values() for cell in line)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout='constrained', squeeze=False)
    for ax, (title, places, lines) in zip(axes[0], panels, strict=True):
        for number, (label, cells) in enumerate(lines.items()):
            look = dict(color=f'C{number}', marker='osD^'[number])
            draw_line(ax, cells, 0.06 * (number - (len(lines) - 1) / 2), look)
            ax.plot([], [], label=label, **look)
        ax.set_xticks(range(len(places)), places)
        ax.set(xlabel=xlabel, ylabel='top-1 on the test set, %')
        ax.set_title(f'{title}\n{marks_of(lines)}', fontsize='medium')
        ax.legend(fontsize='small')
    figure.savefig(PICTURES / name, dpi=100)


def draw_line(ax: Any, cells: list[Seeds], shift: float, look: dict[str, Any]) -> None:
    """Join the means; those of several runs have a filled mark and a bar, the standard deviation."""
    mean, spread = zip(*map(moments, cells), strict=True)
    ax.errorbar(
        [place + shift for place in range(len(cells))], mean, spread, capsize=3, markerfacecolor='white', **look
    )
    several = [place for place, runs in enumerate(cells) if len(runs) > 1]
    ax.plot([place + shift for place in several], [mean[place] for place in several], linestyle='', zorder=3, **look)


def marks_of(lines: dict[str, list[Seeds]]) -> str:
    """Say what the marks of a panel stand for."""
    counts = {len(runs) for cells in lines.values() for runs in cells}
    if counts == {1}:
        return 'single runs'
    several = ' or '.join(str(count) for count in sorted(counts - {1}))
    return f'bars: standard deviation of {several} runs{"; open marks: one run" if 1 in counts else ""}'


def moments(runs: Seeds) -> tuple[float, float]:
    top1 = [run['last'] for run in runs.values()]
    return statistics.mean(top1), statistics.stdev(top1) if len(top1) > 1 else math.nan


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    runs = Runs(read_runs())
    for path, text in pages(runs).items():
        with whole_file(path) as file:
            file.write(text.encode())
    draw(runs)


if __name__ == '__main__':
    main()
