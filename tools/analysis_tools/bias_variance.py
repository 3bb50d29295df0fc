"""Estimate bias and variance of the networks that configs train: each config K times, on K resamples of its data.

The k-th run of every config has the same resample and the same seed, so that configs are compared in pairs. Runs that
are finished are not done again, and those that were killed go on. Writes results.csv, results.json and
bias_variance.png.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import csv
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction

from mmwsl.analysis import FEWEST_MODELS, bootstrap, pseudo_values, read_records, regularization_share
from mmwsl.analysis.predict import build_dataloader, build_model, log_probabilities
from mmwsl.engine import check_data, latest_checkpoint, merge_options
from mmwsl.utils import load_network, whole_file
from mmwsl.engine.runs import train

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
QUANTITIES = {  # their axes
    'error': 'top-1 error (%)',
    'loss': 'expected loss (nats)',
    'bias': 'bias (nats)',
    'variance': 'variance (nats)',
    'share': 'regularization samples (%)',
    'weight': 'mean weight w',
}


@dataclass
class Arm:
    """One contestant: a config, at one temperature."""

    name: str
    cfg: Config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'configs', nargs='+', type=Path, metavar='CONFIG', help='the first is what the others are compared with'
    )
    parser.add_argument(
        '--models', type=int, default=10, help=f'runs of each config, K; fewer than {FEWEST_MODELS} give means alone'
    )
    parser.add_argument('--taus', type=float, nargs='+', help='temperatures to try in configs with soft labels')
    parser.add_argument(
        '--same-data',
        action='store_true',
        help='train all on the training set itself: variance is then that of initial weights, order and views alone',
    )
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/bias_variance'))
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        default={},
        help='settings to override in every config',
    )
    args = parser.parse_args()
    if args.models < 2:
        parser.error(f'variance between models needs two of them or more, got --models {args.models}')
    return args


def main() -> None:
    args = parse_args()
    arms = list(make_arms(args.configs, args.taus, args.cfg_options))
    for arm in arms:
        check_data(arm.cfg, ('train_dataloader', 'val_dataloader'))
    train_all(arms, args)
    rows = estimate(arms, args)
    write(rows, args.out)
    print_table(rows)
    draw(rows, args.out / 'bias_variance.png', args)
    print(f'\nIn {args.out}: results.csv, results.json, bias_variance.png')


def make_arms(configs: list[Path], taus: list[float] | None, options: dict) -> Iterator[Arm]:
    """Each config, or each with soft labels at each temperature.

    Raises:
        ValueError: If two configs have the same name.
    """
    if len({path.stem for path in configs}) < len(configs):
        raise ValueError(f'configs should have different names, got {[path.stem for path in configs]}')
    for path in configs:
        for tau in taus or [None]:
            cfg = Config.fromfile(path)
            merge_options(cfg, options)
            softened = [loss for loss in distill_losses(cfg).values() if 'tau' in loss]
            if tau is None or not softened:
                yield Arm(path.stem, cfg)
                break
            for loss in softened:
                loss.tau = tau
            yield Arm(f'{path.stem}_tau{tau:g}', cfg)


def distill_losses(cfg: Config) -> dict:
    return cfg.model.get('distiller', {}).get('distill_losses', {})


def train_all(arms: list[Arm], args: argparse.Namespace) -> None:
    """Train and predict; every run is finished, or an error names the one that failed."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    # all before the first run, so that a folder with other settings is found at once
    configs = [(arm, prepare(arm, model, args)) for model in range(args.models) for arm in arms]
    total = len(configs)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {
            pool.submit(train, TRAIN, config, config.parent / 'run', threads=threads): (arm, config.parent)
            for arm, config in configs
        }
        try:
            for number, future in enumerate(as_completed(running), 1):
                future.result()
                arm, folder = running[future]
                accuracy = predict(arm, folder)
                print(
                    f'[{number:{len(str(total))}}/{total}] {folder.parent.name}, run {folder.name}: '
                    f'{100 * accuracy:.2f} % top-1',
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare(arm: Arm, model: int, args: argparse.Namespace) -> Path:
    """Write the config of one run.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """
    cfg = arm.cfg.copy()
    cfg.randomness = dict(seed=model)
    loader = cfg.train_dataloader
    if not args.same_data:
        holder = loader.dataset if loader.dataset.type in ('mmwsl.SeededViews', 'mmwsl.DeviceDataset') else loader
        holder.dataset = dict(type='mmwsl.BootstrapDataset', seed=model, dataset=holder.dataset)
    if any(loss.type == 'mmwsl.WSLLoss' for loss in distill_losses(cfg).values()):
        cfg.default_hooks.sample_records = dict(type='mmwsl.SampleRecordHook')
    config = args.out / arm.name / str(model) / 'config.py'
    config.parent.mkdir(parents=True, exist_ok=True)
    if config.exists() and config.read_text() != cfg.pretty_text:
        raise ValueError(
            f'{config.parent} holds a run with other settings, see config.py there: choose another --out, or delete it'
        )
    with whole_file(config) as file:
        file.write(cfg.pretty_text.encode())
    return config


def predict(arm: Arm, folder: Path) -> float:
    """Keep what a trained network predicts for the test images; return its accuracy."""
    if not (folder / 'log_probs.npy').exists():
        network = build_model(arm.cfg, student_only=True)
        load_network(network, str(latest_checkpoint(folder / 'run')))
        log_probs, target = log_probabilities(network, build_dataloader(arm.cfg, 'val_dataloader'))
        for name, array in (('target', target), ('log_probs', log_probs)):  # the last says that both are there
            with whole_file(folder / f'{name}.npy') as file:
                np.save(file, array)
    log_probs, target = np.load(folder / 'log_probs.npy'), np.load(folder / 'target.npy')
    return float((log_probs.argmax(1) == target).mean())


def estimate(arms: list[Arm], args: argparse.Namespace) -> list[dict]:
    """A row for each arm and quantity: its mean with its interval, and the same of its difference to the first arm.

    Fewer than FEWEST_MODELS give no intervals, nor bias and variance, which may then come out negative.
    """
    rows, first = [], {}
    for arm in arms:
        values = samples(args.out / arm.name, args.models)
        first = first or values
        for quantity, value in values.items():
            row = dict(arm=arm.name, models=args.models, quantity=quantity, **estimated(value))
            if quantity in first and first is not values:
                if first[quantity].shape != value.shape:
                    raise ValueError(
                        f'{arm.name} was tested on other images than {arms[0].name}: they cannot be compared in pairs'
                    )
                difference = estimated(value - first[quantity])
                row.update({f'difference_{name}': number for name, number in difference.items()})
            rows.append(row)
    return rows


def estimated(values: np.ndarray) -> dict[str, float | None]:
    """The mean and its interval; None for the ends where there is none."""
    return {name: None if np.isnan(number) else number for name, number in bootstrap(values)._asdict().items()}


def samples(folder: Path, models: int) -> dict[str, np.ndarray]:
    """Each quantity, with a row for each model and a column for each image, or one of the mean over the run."""
    runs = [folder / str(model) for model in range(models)]
    log_probs, target = np.stack([np.load(run / 'log_probs.npy') for run in runs]), np.load(runs[0] / 'target.npy')
    values = {'error': 100.0 * (log_probs.argmax(2) != target), **pseudo_values(log_probs, target)._asdict()}
    if models < FEWEST_MODELS:
        values = {name: values[name] for name in ('error', 'loss')}
    if (runs[0] / 'run/sample_records').exists():
        records = [list(read_records(run / 'run').values()) for run in runs]
        values['share'] = np.array(
            [[100 * np.mean([regularization_share(epoch) for epoch in epochs])] for epochs in records]
        )
        values['weight'] = np.array([[np.mean([epoch['w'].mean() for epoch in epochs])] for epochs in records])
    return {name: values[name] for name in QUANTITIES if name in values}


def write(rows: list[dict], out: Path) -> None:
    with whole_file(out / 'results.json') as file:
        file.write((json.dumps(rows, indent=1) + '\n').encode())
    with (out / 'results.csv').open('w', newline='') as stream:
        writer = csv.DictWriter(stream, max((list(row) for row in rows), key=len))
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict]) -> None:
    width = max(len(row['arm']) for row in rows)
    few = rows[0]['models'] < FEWEST_MODELS
    print(
        f'\n{"":{width}}  quantity                     mean  {"" if few else "95 % interval      "}difference to the '
        'first'
    )
    for row in rows:
        line = f'{row["arm"]:{width}}  {QUANTITIES[row["quantity"]]:26} {row["value"]:6.3f}'
        line += '' if few else f'  {row["low"]:6.3f} to {row["high"]:6.3f}'
        if 'difference_value' in row:
            line += f'   {row["difference_value"]:+7.3f}'
            line += '' if few else f'  {row["difference_low"]:+7.3f} to {row["difference_high"]:+7.3f}'
        print(line)
    if few:
        print(
            f'\n{rows[0]["models"]} networks of each config are too few for intervals, bias and variance: give '
            f'--models {FEWEST_MODELS} or more.'
        )


def draw(rows: list[dict], path: Path, args: argparse.Namespace) -> None:
    """A panel for each quantity, a line for each arm."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(row['arm'] for row in rows))
    quantities = list(dict.fromkeys(row['quantity'] for row in rows))
    figure, panels = plt.subplots(
        1,
        len(quantities),
        figsize=(1.5 + 2.1 * len(quantities), 1.4 + 0.32 * len(arms)),
        sharey=True,
        layout='constrained',
    )
    for quantity, panel in zip(quantities, panels, strict=True):
        for row in (row for row in rows if row['quantity'] == quantity):
            ends = (
                None
                if row['low'] is None
                else [[max(0, row['value'] - row['low'])], [max(0, row['high'] - row['value'])]]
            )
            panel.errorbar(row['value'], arms.index(row['arm']), fmt='ko', markersize=4, capsize=3, xerr=ends)
        panel.set(xlabel=QUANTITIES[quantity])
        panel.grid(axis='x', alpha=0.3)
    panels[0].set(yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5))
    data = 'the training set itself' if args.same_data else 'resamples of the training set'
    shown = 'mean' if args.models < FEWEST_MODELS else 'mean and 95 % interval'
    figure.suptitle(f'{args.models} networks each, on {data}: {shown}', fontsize='medium')
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    main()
