"""Make choosing.py's tables with a row for each method: weight of the loss, other losses, L_t, wrong labels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from catalogue import Seeds, difference, mean_and_spread

from mmwsl.utils.pictures import pyplot
from mmwsl.utils.text import table

HALF = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}
KD, WSL = ('model.distiller.distill_losses.' + name for name in ('loss_kd.loss_weight', 'loss_wsl.weighting'))
LARGER = {'model.distiller.distill_losses.loss_wsl.loss_weight': '3.4'}
NOISE = 'train_dataloader.dataset.dataset.pipeline.0.prob'
FEW = {'train_dataloader.dataset.dataset.indices': '10000'}
DIGITS, CIFAR = 'digits', 'r56_r20_cifar100_8e'
PLAIN = 'KD: CE + 2.25 KL'


@dataclass(frozen=True)
class Method:
    """A row: its label, and the config and settings of its runs on each dataset."""

    label: str
    config: str
    """Name of the config, with {} in place of the pair."""
    settings: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    """Whether it is the student alone, whose config names no teacher."""
    by_pair: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Settings of the runs on one dataset."""

    def name(self, pair: str) -> str:
        student = {DIGITS: 'digits_student', CIFAR: 'r20_cifar100_8e'}[pair]
        return self.config.format(student if self.alone else pair)


KD_PLAIN = Method(PLAIN, 'kd_{}')
FIELDS = Method("the field's KD: 0.1 CE + 0.9 KL", 'kd-hinton_{}')
WSL_PAPER = Method('WSL: CE + 2.25 w H', 'wsl_{}')
ALONE = Method('student alone', '{}', alone=True)

STEP = (
    ALONE,
    FIELDS,
    Method("the field's KD, learning rate x 3", 'kd-hinton_{}', {'optim_wrapper.optimizer.lr': '0.3'}),
    Method('0.1 CE + 9 KL', 'kd-hinton_{}', {KD: '9'}),
    Method('CE + 0.9 KL', 'kd_{}', {KD: '0.9'}),
    KD_PLAIN,
    Method('CE + 4.5 KL', 'kd_{}', {KD: '4.5'}),
    Method('CE + 9 KL', 'kd_{}', {KD: '9'}),
    WSL_PAPER,
    Method("KD at 2.25 x WSL's mean w", 'kd_{}', by_pair={DIGITS: {KD: '1.789'}, CIFAR: {KD: '2.178'}}),
)
LOSSES = (
    KD_PLAIN,
    FIELDS,
    Method('standardised logits', 'kd-ls_{}'),
    Method('DKD', 'dkd_{}'),
    Method('NKD', 'nkd_{}'),
    Method('DIST', 'dist_{}'),
    Method('WTTM', 'wttm_{}'),
    WSL_PAPER,
    Method("DKD x WSL's weight", 'wsl-dkd_{}'),
    Method("NKD x WSL's weight", 'wsl-nkd_{}'),
    Method("DIST x WSL's weight", 'wsl-dist_{}'),
)
TEACHER_LOSS = (
    KD_PLAIN,
    WSL_PAPER,
    Method('WSL, L_t out of fold', 'wsl-oof_{}'),
    Method('WSL, L_t out of fold, in random order', 'wsl-oof-random_{}'),
    Method('WSL, L_t out of fold, CE + 3.4 w H', 'wsl-oof_{}', LARGER),
    Method('WSL, L_t out of fold, in random order, CE + 3.4 w H', 'wsl-oof-random_{}', LARGER),
    Method('softness x need: entropy x w, out of fold', 'wsl-oof-entropy_{}'),
    Method('WSL, losses divided by their means', 'wsl-free_{}'),
    Method("the teacher's entropy as weight", 'kd-entropy_{}'),
)
WEIGHT = {
    'KD': ('wsl_{}', 'kd_{}'),
    'KD, L_t out of fold, against its weights in random order': ('wsl-oof_{}', 'wsl-oof-random_{}'),
    'DKD': ('wsl-dkd_{}', 'dkd_{}'),
    'NKD': ('wsl-nkd_{}', 'nkd_{}'),
    'DIST': ('wsl-dist_{}', 'dist_{}'),
}
WRONG = (
    Method('student alone', '{}_noise', alone=True),
    Method('KD', 'kd_{}_noise'),
    Method('WSL', 'wsl_{}_noise'),
    Method('WSL without labels', 'wsl_{}_noise', {WSL: 'label_free'}),
    Method('WSL, L_t out of fold', 'wsl-oof_{}_noise'),
)


class Found:
    """Finds runs by config and settings; those of a GPU, in bfloat16, if there are any.

    Args:
        runs: By config and settings, as choosing.Runs has them.
    """

    def __init__(self, runs: Mapping[tuple[str, frozenset], Seeds]) -> None:
        self.runs = runs

    def of(self, method: Method, pair: str, **settings: str) -> Seeds:
        wanted = {**method.settings, **method.by_pair.get(pair, {}), **settings}
        halves = self.runs.get((method.name(pair), frozenset({**wanted, **HALF}.items())), {})
        return halves or self.runs.get((method.name(pair), frozenset(wanted.items())), {})


def methods_table(found: Found, methods: Sequence[Method], against: Method) -> str:
    """Return a table of each method's last and best epoch on both datasets, and its difference from one method."""
    rows = []
    for method in methods:
        cells: list[str] = []
        for pair in (DIGITS, CIFAR):
            seeds = found.of(method, pair)
            cells += [last_and_best(seeds), '' if method is against else gap(seeds, found.of(against, pair))]
        rows.append((method.label, *cells))
    title = f'minus {against.label.partition(":")[0]}'
    return table(('Soft labels', 'Digits', title, 'CIFAR-100, 8 epochs', title), rows)


def weight_table(found: Found) -> str:
    """Return a table of what WSL's weight adds to each loss."""
    rows = [
        (label, *(gap(*(found.of(Method('', config), pair) for config in configs)) for pair in (DIGITS, CIFAR)))
        for label, configs in WEIGHT.items()
    ]
    return table(('Weighted - plain', 'Digits', 'CIFAR-100, 8 epochs'), rows)


def wrong_table(found: Found) -> str:
    """Return a table of the methods at two shares of wrong labels."""
    places = [('Digits', DIGITS, {}), ('CIFAR-100, 10,000 images', CIFAR, FEW)]
    rows = []
    for title, pair, few in places:
        for prob in ('0.2', '0.4'):
            cells = {method.label: found.of(method, pair, **{NOISE: prob}, **few) for method in WRONG}
            rows += [
                (
                    title,
                    f'{float(prob):.0%}',
                    label,
                    last_and_best(seeds),
                    '' if label == 'KD' else gap(seeds, cells['KD']),
                )
                for label, seeds in cells.items()
            ]
    return table(('Data', 'Wrong labels', 'Soft labels', 'Top-1', 'minus KD'), rows)


def last_and_best(seeds: Seeds) -> str:
    """Return mean and standard deviation of the last epoch, the mean of the best, and the number of runs."""
    if not seeds:
        return ''
    runs = list(seeds.values())
    return f'{mean_and_spread(runs)} (best {statistics.mean(run["best"] for run in runs):.2f}; {len(runs)})'


def gap(first: Seeds, second: Seeds) -> str:
    """Return the last epochs' difference and its standard error, in pairs by seed if all ran on one kind of machine."""
    if min(len(first), len(second)) < 2:
        return ''
    kinds = {run['machine'].get('gpu') for run in (*first.values(), *second.values())}
    if len(kinds) == 1 and len(first.keys() & second.keys()) > 1:
        return difference(first, second)
    ours, theirs = ([run['last'] for run in seeds.values()] for seeds in (first, second))
    error = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
    return f'{statistics.mean(ours) - statistics.mean(theirs):+.2f} ± {error:.2f}, unpaired'


def draw_methods(found: Found, path: Path) -> None:
    """Draw what each method reaches on CIFAR-100, a ring for each run and a bar for their mean, if KD has been run."""
    if not found.of(KD_PLAIN, CIFAR):
        return
    plt = pyplot()
    methods = {method.label: method for method in (*STEP, *TEACHER_LOSS, *LOSSES)}
    rows = sorted(
        (statistics.mean(top1), label, top1)
        for label, method in methods.items()
        if (top1 := [run['last'] for run in found.of(method, CIFAR).values()])
    )
    figure, ax = plt.subplots(figsize=(8, 0.32 * len(rows) + 1), layout='constrained')
    plain = statistics.mean(run['last'] for run in found.of(KD_PLAIN, CIFAR).values())
    ax.axvline(plain, color='0.6', linestyle=':', label='mean of plain soft labels (KD)')
    for place, (mean, _, top1) in enumerate(rows):
        ax.plot(top1, [place] * len(top1), 'o', markerfacecolor='none', color='C0', label='' if place else 'one run')
        bar = [place - 0.3, place + 0.3]
        ax.plot([mean, mean], bar, color='C0', linewidth=2, label='' if place else 'mean of the runs')
    ax.set_yticks(range(len(rows)), [label for _, label, _ in rows])
    ax.set(xlabel='top-1 of the student on the test set, %', title='ResNet-56 -> ResNet-20, CIFAR-100, 8 epochs')
    ax.legend(loc='upper left')
    figure.savefig(path, dpi=100)
