"""Estimate bias and variance of the networks that configs train, from K runs of each on K resamples of its data.

The k-th run of every config has the same resample and the same seed, so that configs are compared in pairs. Finished
runs are not repeated, and killed ones resume. Writes results.csv, results.json and, for several configs,
bias_variance.png.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import csv
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, DictAction

from mmwsl.analysis import FEWEST_MODELS, bootstrap, pseudo_values, read_records, regularization_share
from mmwsl.analysis.predict import build_dataloader, build_model, log_probabilities
from mmwsl.engine import check_data, latest_checkpoint, merge_options
from mmwsl.utils import load_network, whole_file
from mmwsl.engine.runs import train
from mmwsl.utils.pictures import pyplot

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
QUANTITIES = {  # with the labels of their axes
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
    config: Path
    tau: float | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'configs', nargs='+', type=Path, metavar='CONFIG', help='the others are compared with the first'
    )
    parser.add_argument(
        '--models', type=int, default=10, help=f'runs of each config, K; fewer than {FEWEST_MODELS} give means alone'
    )
    parser.add_argument('--names', nargs='+', help='what the configs are called in the picture; default: their names')
    parser.add_argument('--taus', type=float, nargs='+', help='temperatures to try in configs with soft labels')
    parser.add_argument(
        '--same-data',
        action='store_true',
        help='train all on the training set itself: variance is then only that of initial weights, order and views',
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
    if args.names and len(args.names) != len(args.configs):
        parser.error(f'--names takes one for each of {len(args.configs)} configs, got {len(args.names)}')
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
    pictures = ''
    if len(arms) > 1:
        draw(rows, args.out / 'bias_variance.png', names_of(arms, args), note_on(args.models, args.same_data))
        pictures = ', bias_variance.png'
    print(f'\nIn {args.out}: results.csv, results.json{pictures}')


def make_arms(configs: list[Path], taus: list[float] | None, options: dict) -> Iterator[Arm]:
    """Yield each config, those with soft labels at each temperature.

    Raises:
        ValueError: If two configs have the same name.
    """
    if len({path.stem for path in configs}) < len(configs):
        raise ValueError(f'configs should have different names, got {[path.stem for path in configs]}')
    for path in configs:
        temperatures: Sequence[float | None] = taus or [None]
        for tau in temperatures:
            cfg = Config.fromfile(path)
            merge_options(cfg, options)
            softened = [loss for loss in distill_losses(cfg).values() if 'tau' in loss]
            if tau is None or not softened:
                yield Arm(path.stem, cfg, path)
                break
            for loss in softened:
                loss.tau = tau
            yield Arm(f'{path.stem}_tau{tau:g}', cfg, path, tau)


def names_of(arms: list[Arm], args: argparse.Namespace) -> dict[str, str]:
    """Return what each arm is called in the picture."""
    given = dict(zip(args.configs, args.names or [path.stem for path in args.configs], strict=True))
    return {arm.name: given[arm.config] + (f', tau {arm.tau:g}' if arm.tau else '') for arm in arms}


def distill_losses(cfg: Config) -> dict:
    return cfg.model.get('distiller', {}).get('distill_losses', {})


def train_all(arms: list[Arm], args: argparse.Namespace) -> None:
    """Train all runs and predict with them; an error names the run that failed."""
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
    """Store a trained network's predictions for the test images, and return its accuracy."""
    if not (folder / 'log_probs.npy').exists():
        network = build_model(arm.cfg, student_only=True)
        load_network(network, str(latest_checkpoint(folder / 'run')))
        log_probs, target = log_probabilities(network, build_dataloader(arm.cfg, 'val_dataloader'))
        for name, array in (('target', target), ('log_probs', log_probs)):  # the last one shows that both are there
            with whole_file(folder / f'{name}.npy') as file:
                np.save(file, array)
    log_probs, target = np.load(folder / 'log_probs.npy'), np.load(folder / 'target.npy')
    return float((log_probs.argmax(1) == target).mean())


def estimate(arms: list[Arm], args: argparse.Namespace) -> list[dict]:
    """Return a row for each arm and quantity: mean and interval, also of its difference from the first arm.

    Fewer than FEWEST_MODELS give no intervals, nor bias and variance, which might then be negative.
    """
    rows: list[dict] = []
    first: dict[str, np.ndarray] = {}
    for arm in arms:
        values = samples(args.out / arm.name, args.models)
        first = first or values
        for quantity, value in values.items():
            row = dict(arm=arm.name, models=args.models, quantity=quantity, **estimated(value))
            if quantity in first and first is not values:
                if first[quantity].shape != value.shape:
                    raise ValueError(
                        f'{arm.name} was tested on other images than {arms[0].name}, so they cannot be compared in '
                        'pairs. Give both configs the same val_dataloader'
                    )
                difference = estimated(value - first[quantity])
                row.update({f'difference_{name}': number for name, number in difference.items()})
            rows.append(row)
    return rows


def estimated(values: np.ndarray) -> dict[str, float | None]:
    """Return the mean and the ends of its interval; None for the ends if there is no interval."""
    return {name: None if np.isnan(number) else number for name, number in bootstrap(values)._asdict().items()}


def samples(folder: Path, models: int) -> dict[str, np.ndarray]:
    """Return each quantity with a row for each model, and a column for each image or one for the run's mean."""
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


def draw(rows: list[dict], path: Path, names: dict[str, str], note: str) -> None:
    """Draw each arm's differences to the first, a panel for each quantity; the first is the line at zero.

    Args:
        rows: As :func:`estimate` returns them.
        path: The picture's file.
        names: What arms are called in it.
        note: How networks were trained.
    """
    plt = pyplot()
    first, *others = dict.fromkeys(row['arm'] for row in rows)
    places = {arm: place for place, arm in enumerate(others)}
    quantities = list(dict.fromkeys(row['quantity'] for row in rows if row['arm'] in places))
    figure, panels = plt.subplots(
        1,
        len(quantities),
        figsize=(1.5 + 2.1 * len(quantities), 1.8 + 0.32 * len(others)),
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    for quantity, panel in zip(quantities, panels[0], strict=True):
        of_quantity = [row for row in rows if row['quantity'] == quantity]
        for row in of_quantity:
            if row.get('difference_value') is not None:
                _draw_difference(panel, places[row['arm']], row)
        panel.axvline(0, color='0.4', linewidth=1)
        panel.set(xlabel=QUANTITIES[quantity])
        panel.set_title(_value_of(first, of_quantity), fontsize='small')
        panel.grid(axis='x', alpha=0.3)
    panels[0][0].set(
        yticks=range(len(others)), yticklabels=[names[arm] for arm in others], ylim=(len(others) - 0.5, -0.5)
    )
    few = rows[0]['low'] is None
    shown = 'mean' if few else 'mean and 95 % interval; a filled circle where the interval leaves out zero'
    figure.suptitle(f'Difference to {names[first]}, whose own figures are above. {note}: {shown}', fontsize='medium')
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_difference(panel: Any, place: int, row: dict) -> None:
    value, low, high = (row[f'difference_{end}'] for end in ('value', 'low', 'high'))
    ends = None if low is None else [[max(0, value - low)], [max(0, high - value)]]
    sure = low is None or low > 0 or high < 0
    panel.errorbar(value, place, fmt='ko', markersize=5, capsize=3, xerr=ends, markerfacecolor='k' if sure else 'white')


def _value_of(first: str, rows: list[dict]) -> str:
    return next((f'zero: {row["value"]:.3g}' for row in rows if row['arm'] == first), 'not defined')


def note_on(models: int, same_data: bool) -> str:
    """Say how the networks of a picture were trained."""
    return f'{models} networks each, on {"the training set itself" if same_data else "resamples of the training set"}'


if __name__ == '__main__':
    main()
