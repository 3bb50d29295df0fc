"""Show which samples are regularization samples: how many, how they come and go, and what they look like.

From the records that mmwsl.SampleRecordHook wrote in one or several work dirs of the same config, or from checkpoints:

    regularization_samples.py WORK_DIR...
    regularization_samples.py CONFIG --checkpoints epoch_1.pth epoch_5.pth --taus 1 2 4 8

Writes share.csv, share.png, flow.csv, flow.png, summary.csv, and contact sheets of the images with the largest and the
smallest weights in the last epoch of the first run.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import csv
import itertools
import re
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, init_default_scope

from mmwsl.analysis import bootstrap, changed, flow, lowered_logit_share, read_records, regularization_share
from mmwsl.analysis.predict import records_of_checkpoints
from mmwsl.engine import check_data, merge_options
from mmwsl.utils.pictures import pyplot

plt = pyplot()


STYLES = ('k-o', 'k--s', 'k:^', 'k-.D', '0.5-v', '0.5--P')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='+', type=Path, metavar='SOURCE', help='work dirs, or one config')
    parser.add_argument('--checkpoints', nargs='+', type=Path, help='of the config: epoch_<N>.pth')
    parser.add_argument(
        '--taus',
        nargs='+',
        type=float,
        help="temperatures; default: the config's. Other ones need "
        'checkpoints, since records hold that of the run alone',
    )
    parser.add_argument('--images', type=int, default=24, help='images on a contact sheet')
    parser.add_argument(
        '--out',
        type=Path,
        help='default: regularization_samples in the first work dir, or in the folder of the first checkpoint',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        default={},
        help='settings of CONFIG to override',
    )
    args = parser.parse_args()
    if args.taus and not args.checkpoints:
        parser.error('--taus needs --checkpoints: records hold the temperature of their run alone')
    if args.checkpoints and len(args.sources) > 1:
        parser.error('--checkpoints belong to one config')
    return args


def main() -> None:
    args = parse_args()
    if args.checkpoints:
        cfg = Config.fromfile(args.sources[0])
        merge_options(cfg, args.cfg_options)
        check_data(cfg, ('train_dataloader',))
        checkpoints = {epoch_of(path): str(path) for path in sorted(args.checkpoints, key=epoch_of)}
        series = {
            tau: [epochs]
            for tau, epochs in records_of_checkpoints(cfg, checkpoints, args.taus or [temperature(cfg)]).items()
        }
    else:
        cfg = config_of(args.sources[0])
        series = {temperature(cfg): [read_records(work_dir) for work_dir in args.sources]}
    out = args.out or (args.checkpoints[0].parent if args.checkpoints else args.sources[0]) / 'regularization_samples'
    out.mkdir(parents=True, exist_ok=True)
    shares, flows = share_rows(series), flow_rows(series)
    write_csv(shares, out / 'share.csv')
    draw_shares(shares, out / 'share.png')
    if flows:
        write_csv(flows, out / 'flow.csv')
        draw_flows(flows, out / 'flow.png')
    write_csv(summary_rows(series), out / 'summary.csv')
    print((out / 'summary.csv').read_text())
    epoch, records = list(next(iter(series.values()))[0].items())[-1]
    draw_sheets(cfg, records, epoch, args.images, out)
    print(f'In {out}: {", ".join(sorted(path.name for path in out.iterdir()))}')


def epoch_of(checkpoint: Path) -> int:
    """Return the epoch in the name of a checkpoint.

    Raises:
        ValueError: If the name has none.
    """
    found = re.search(r'epoch_(\d+)\.pth$', checkpoint.name)
    if not found:
        raise ValueError(f'the name of a checkpoint should say its epoch, as epoch_5.pth, got {checkpoint.name}')
    return int(found[1])


def config_of(work_dir: Path) -> Config:
    """Return the config that a run left in its work dir.

    Raises:
        FileNotFoundError: If there is none, or several.
    """
    files = sorted(work_dir.glob('*.py'))
    if len(files) != 1:
        raise FileNotFoundError(
            f'{work_dir} should be the work dir of a run, with its config in it; it has '
            f'{", ".join(path.name for path in files) or "no config"}'
        )
    return Config.fromfile(files[0])


def temperature(cfg: Config) -> float:
    """Return the temperature of a config's soft labels.

    Raises:
        ValueError: If the config has no loss with soft labels.
    """
    losses = cfg.model.get('distiller', {}).get('distill_losses', {})
    taus = [loss.tau for loss in losses.values() if 'tau' in loss]
    if not taus:
        raise ValueError('no loss of model.distiller.distill_losses names its tau: give --checkpoints and --taus')
    return taus[0]


def share_rows(series: dict[float, list]) -> list[dict]:
    """Return a row for each temperature, run and epoch: the share of regularization samples in percent, and mean terms.

    ``held_back`` is the share of those whose soft label lowers the true class's logit.
    """
    return [
        dict(
            tau=tau,
            run=run,
            epoch=epoch,
            samples=len(records),
            share=100 * regularization_share(records),
            held_back=100 * lowered_logit_share(records),
            mean_w=float(records['w'].mean()),
            mean_L_s=float(records['L_s'].mean()),
            mean_L_t=float(records['L_t'].mean()),
        )
        for tau, runs in series.items()
        for run, epochs in enumerate(runs)
        for epoch, records in epochs.items()
    ]


def flow_rows(series: dict[float, list]) -> list[dict]:
    """Return a row for each temperature, run and pair of successive epochs: the flow in percent.

    ``kept`` is the part of the earlier set that is in the later one, and ``by_chance`` what it would be if membership
    in one epoch said nothing about the next.
    """
    rows = []
    for tau, runs in series.items():
        for run, epochs in enumerate(runs):
            for before, after in itertools.pairwise(epochs):
                moved = flow(epochs[before], epochs[after])
                rows.append(
                    dict(
                        tau=tau,
                        run=run,
                        before=before,
                        epoch=after,
                        **{name: 100 * value for name, value in moved._asdict().items()},
                        kept=100 * moved.kept,
                        by_chance=100 * (moved.stay + moved.enter),
                    )
                )
    return rows


def summary_rows(series: dict[float, list]) -> list[dict]:
    """Return means over runs in percent, with intervals from resampling the runs, if there are enough of them."""
    rows = []
    for tau, runs in series.items():
        first, last = ([list(epochs.values())[place] for epochs in runs] for place in (0, -1))
        quantities = {
            'share in the first epoch': [regularization_share(records) for records in first],
            'share in the last epoch': [regularization_share(records) for records in last],
            'held back in the last epoch': [lowered_logit_share(records) for records in last],
            'change sides in some epoch': [changed(list(epochs.values())) for epochs in runs],
        }
        for quantity, values in quantities.items():
            estimate = bootstrap(100 * np.array(values)[:, None])
            ends = {name: '' if np.isnan(number) else number for name, number in estimate._asdict().items()}
            rows.append(dict(tau=tau, quantity=quantity, runs=len(values), **ends))
    return rows


def write_csv(rows: list[dict], path: Path) -> None:
    with path.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_shares(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout='constrained')
    for tau, style in zip(unique(rows, 'tau'), itertools.cycle(STYLES), strict=False):
        for axes, quantity in zip(panels, ('share', 'held_back'), strict=True):
            draw_line(axes, [row for row in rows if row['tau'] == tau], quantity, style, f'tau {tau:g}')
    for axes, name in zip(panels, ('all', "those whose soft label lowers\nthe true class's logit"), strict=True):
        axes.set(xlabel='epoch', ylim=(-2, 102), title=name)
    panels[0].set(ylabel='regularization samples\n(% of training samples)')
    panels[0].legend(title=title(rows))
    figure.savefig(path, dpi=100)


def draw_flows(rows: list[dict], path: Path) -> None:
    taus = unique(rows, 'tau')
    figure, panels = plt.subplots(len(taus), 2, figsize=(9, 3.4 * len(taus)), squeeze=False, layout='constrained')
    for tau, (left, right) in zip(taus, panels, strict=True):
        some = [row for row in rows if row['tau'] == tau]
        draw_line(left, some, 'enter', 'k-^', 'come in since the epoch before')
        draw_line(left, some, 'leave', 'k--v', 'go out')
        left.set(xlabel='epoch', ylabel='% of training samples', ylim=(0, None), title=f'tau {tau:g}')
        draw_line(right, some, 'kept', 'k-o', 'measured')
        draw_line(right, some, 'by_chance', '0.5--s', 'if epochs were independent')
        right.set(
            xlabel='epoch', ylabel="% of the epoch before's set\nthat is still in it", ylim=(-2, 102), title=title(rows)
        )
        left.legend()
        right.legend()
    figure.savefig(path, dpi=100)


def draw_line(axes: Any, rows: list[dict], quantity: str, style: str, label: str) -> None:
    """Draw the mean over runs, and a band from the smallest value to the largest."""
    epochs = unique(rows, 'epoch')
    values = [[row[quantity] for row in rows if row['epoch'] == epoch] for epoch in epochs]
    color, style = ('0.5', style[3:]) if style.startswith('0.5') else ('k', style[1:])
    axes.plot(epochs, [np.mean(some) for some in values], style, color=color, markersize=4, label=label)
    axes.fill_between(
        epochs, [min(some) for some in values], [max(some) for some in values], color=color, alpha=0.15, linewidth=0
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def unique(rows: list[dict], field: str) -> list:
    return list(dict.fromkeys(row[field] for row in rows))


def title(rows: list[dict]) -> str:
    runs = len(unique(rows, 'run'))
    return f'mean and range of {runs} runs' if runs > 1 else ''


def draw_sheets(cfg: Config, records: np.ndarray, epoch: int, count: int, out: Path) -> None:
    """Draw the images with the largest and the smallest weights; each once, though a resample may hold it twice."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    datasets = [DATASETS.build({**part, 'pipeline': []}) for part in innermost(cfg.train_dataloader.dataset)]
    records = records[np.unique(records['index'], return_index=True)[1]]
    order = np.argsort(records['L_s'] / (records['L_t'] + 1e-7))  # as w, which rounds to 1
    for name, chosen in (('smallest', order[:count]), ('largest', order[::-1][:count])):
        draw_sheet(
            datasets,
            records[chosen],
            f'{name} weights w in epoch {epoch} (losses in nats)',
            out / f'{name}_weights.png',
        )


def innermost(cfg: dict) -> list[dict]:
    """Return the configs of the innermost datasets; indices in records count through all of them."""
    while isinstance(cfg.get('dataset'), dict):
        cfg = cfg['dataset']
    return [found for part in cfg['datasets'] for found in innermost(part)] if 'datasets' in cfg else [cfg]


def image_of(datasets: list, index: int) -> dict:
    """Return what the datasets know about the image with this index in records.

    Raises:
        ValueError: If there is none.
    """
    place = index
    for dataset in datasets:
        if place < len(dataset):
            return dataset.get_data_info(place)
        place -= len(dataset)
    raise ValueError(
        f'the records are of another training set: they have an image {index}, and the train_dataloader '
        f"of the run's config has {index - place} images"
    )


def draw_sheet(datasets: list, records: np.ndarray, heading: str, path: Path) -> None:
    columns, classes = 8, datasets[0].metainfo['classes']
    rows = -(-len(records) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(1.25 * columns, 0.4 + 1.85 * rows), squeeze=False, layout='constrained'
    )
    for panel in panels.flat:
        panel.axis('off')
    for panel, record in zip(panels.flat, records, strict=False):
        info = image_of(datasets, int(record['index']))
        image = info['img'] if 'img' in info else mmcv.imread(info['img_path'], channel_order='rgb')
        panel.imshow(image.squeeze(), cmap='gray', interpolation='nearest')
        panel.set_title(
            f'label: {classes[info["gt_label"]]}\nw = {record["w"]:.3f}\n'
            f'$L_s$ {record["L_s"]:.2g}, $L_t$ {record["L_t"]:.2g}',
            fontsize=7,
        )
    figure.suptitle(heading, fontsize='medium')
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    main()
