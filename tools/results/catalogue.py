"""Write the catalogue of all configs (configs/README.md, metafile.yml, model-index.yml) and docs/results.md's tables.

Names, networks and recipes are read from the configs, parameters and multiply-adds (MACs) are counted. This project's
results come from results/runs.jsonl, which tools/sweep.py writes, and others' from configs/published.yml.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import functools
import json
import re
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmwsl.engine.kept_runs import KeptRuns
from mmwsl.utils import whole_file
from mmwsl.utils.text import table, with_table

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
RESULTS = ROOT / 'results'
PAGE = ROOT / 'docs/results.md'
DATASETS = {
    'in1k': ('ImageNet-1k', (3, 224, 224)),
    'cifar100': ('CIFAR-100', (3, 32, 32)),
    'cifar10': ('CIFAR-10', (3, 32, 32)),
    'digits': ('Digits', (1, 8, 8)),
}
OTHER_TASKS = ('det', 'multi', 'seg')  # folders that the tables of top-1 leave out
METHODS = {
    'wsl': 'Weighted soft labels',
    'kd': 'Plain soft labels',
    'kd-hinton': "Plain soft labels, Hinton's recipe",
    'kd-ls': 'Standardised logits',
    'dkd': 'DKD',
    'nkd': 'NKD',
    'dist': 'DIST',
    'wttm': 'WTTM',
    'wsl-hinton': "Weighted soft labels, Hinton's recipe",
    'wsl-dkd': 'DKD, weighted',
    'wsl-nkd': 'NKD, weighted',
    'wsl-dist': 'DIST, weighted',
    'mmrazor': "MMRazor's weighted soft labels",
    'ablations': 'Ablations of the weight',
    'vanilla': 'Networks alone',
}
# the heading of methods that share a table
SECTIONS = {
    **dict.fromkeys(('kd-ls', 'dkd', 'nkd', 'dist', 'wttm'), 'Other methods'),
    **dict.fromkeys(('wsl-hinton', 'wsl-dkd', 'wsl-nkd', 'wsl-dist'), "Other methods with WSL's weights"),
}
WSL_PAPER = ('Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective', '2102.00650')
# of the methods that are in others' papers: title, and number on arXiv
PAPERS = {
    'kd-hinton': ('Distilling the Knowledge in a Neural Network', '1503.02531'),
    'kd-ls': ('Logit Standardization in Knowledge Distillation', '2403.01427'),
    'dkd': ('Decoupled Knowledge Distillation', '2203.08679'),
    'nkd': (
        'From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and '
        'Customized Soft Labels',
        '2303.13005',
    ),
    'dist': ('Knowledge Distillation from A Stronger Teacher', '2205.10536'),
    'wttm': ('Knowledge Distillation Based on Transformed Teacher Matching', '2402.11148'),
}
NETWORKS = {
    **{f'r{depth}': f'ResNet-{depth}' for depth in (18, 20, 32, 34, 44, 50, 56, 110)},
    'r8x4': 'ResNet-8x4',
    'r32x4': 'ResNet-32x4',
    'wrn16-2': 'WRN-16-2',
    'wrn40-1': 'WRN-40-1',
    'wrn40-2': 'WRN-40-2',
    'vgg8': 'VGG-8',
    'vgg13': 'VGG-13',
    'mbv1': 'MobileNetV1',
    'mbv2': 'MobileNetV2',
    'sv1': 'ShuffleNetV1',
    'sv2': 'ShuffleNetV2',
    'swin-t': 'Swin-T',
    'r56-r44-r32': 'ResNet-56 + 44 + 32',
    'teacher': 'ResNet-14',
    'teacher-ls': 'ResNet-14, label smoothing',
    'student': 'ResNet-8, 2 channels',
    'r56-ls': 'ResNet-56, label smoothing',
}
# settings that do not change a run's last figure: where files are, how they are read, what is logged and when
NEUTRAL = re.compile(
    r'(model\.teacher_ckpt|model\..*\.teacher_losses|.*data_root|.*_workers|work_dir'
    r'|default_hooks\.(logger|checkpoint|sample_records)\..*|train_cfg\.val_interval)='
)
# the tables of docs/dense.md
DENSE = {
    name: {
        f'teacher_{data}': 'teacher',
        f'student_{data}': 'student alone',
        f'kd_{data}': 'plain soft labels',
        f'wsl_{data}': 'weighted soft labels',
        **more,
    }
    for name, data, more in (
        ('segmentation', 'digits-seg', {'cwd_digits-seg': "MMRazor's CWD"}),
        ('several labels', 'digits-multi', {}),
        ('detection', 'digits-det', {'wsl-plain_digits-det': 'weighted, without the factor'}),
        (
            'blood cells',
            'bccd',
            {
                'wsl-plain_bccd': 'weighted, without the factor',
                'bckd_bccd': "BCKD's weight: the factor alone",
                'ld_bccd': "mmdet's LD",
                'cwd_bccd': "MMRazor's CWD",
            },
        ),
        ('blood cells with RetinaNet', 'retinanet_bccd', {}),
    )
}
# what docs/results.md compares
DIFFERENCES = {
    'weighted soft labels - alone': ('wsl_r56_r20_cifar100_8e', 'r20_cifar100_8e'),
    'plain soft labels - alone': ('kd_r56_r20_cifar100_8e', 'r20_cifar100_8e'),
    "plain - plain in Hinton's recipe": ('kd_r56_r20_cifar100_8e', 'kd-hinton_r56_r20_cifar100_8e'),
    "weighted - plain in Hinton's recipe": ('wsl_r56_r20_cifar100_8e', 'kd-hinton_r56_r20_cifar100_8e'),
    'weighted - plain': ('wsl_r56_r20_cifar100_8e', 'kd_r56_r20_cifar100_8e'),
    'weighted - plain, teacher in eval mode': ('wsl_r56_r20_cifar100_8e_eval', 'kd_r56_r20_cifar100_8e_eval'),
    'batch statistics - eval mode, weighted': ('wsl_r56_r20_cifar100_8e', 'wsl_r56_r20_cifar100_8e_eval'),
    'batch statistics - eval mode, plain': ('kd_r56_r20_cifar100_8e', 'kd_r56_r20_cifar100_8e_eval'),
    "MMRazor's - ours, teacher in eval mode": ('mmrazor_r56_r20_cifar100_8e', 'wsl_r56_r20_cifar100_8e_eval'),
}
# the parts of a config's name
NAME = '`<method>_<teacher>_<student>_<dataset>_<variant>.py`'
PARTS = (
    ('method', '`wsl`, `kd`, and those above', 'in `vanilla/`, which trains networks alone'),
    (
        'teacher and student',
        '`r56` is ResNet-56, `wrn40-2` WRN-40-2, `vgg13` VGG-13, `mbv2` MobileNetV2, `sv1` ShuffleNetV1, '
        '`swin-t` Swin-T; `r56-r44-r32` is an ensemble; `-ls`: trained with label smoothing',
        'for the usual pair of `digits`; other pairs follow the dataset there',
    ),
    ('dataset', '`in1k`, `cifar100`, `cifar10`, `digits`', 'never'),
    (
        'variant',
        "`8e`, `15e`: epochs; `eval`: the teacher in eval mode; `cached`: the teacher's answers from disk; "
        '`device`: images on the GPU; `noise`: a fifth of the labels wrong; '
        '`fold`: without a fifth of the training images',
        "for the pair's usual recipe",
    ),
)
COLUMNS = ('Config', 'Teacher', 'Student', 'Recipe', 'Parameters', 'MACs', 'Published', 'Source', 'Measured', 'Runs')
PROSE = """# Configs

Written by `tools/results/catalogue.py` from the configs, [published.yml](published.yml) and [results](../results).
Change those and run it again.

## Kinds of configs

| name | content |
| --- | --- |
| `wsl_<teacher>_<student>_<dataset>` | weighted soft labels |
| `kd_...` | the same with plain soft labels |
| `vanilla/<network>_<dataset>` | a network alone; also trains the teachers |
| `kd-hinton_...` | plain soft labels in the recipe of the published KD figures: 0.1 CE + 0.9 tau^2 KL at \
temperature 4 on CIFAR-100, 0.5 CE + 0.5 KL at temperature 1 on ImageNet |
| `kd-ls_...` | the same on standardised logits, with a larger weight |
| `dkd_...` `nkd_...` `dist_...` `wttm_...` | DKD, NKD, DIST and WTTM |
| `wsl-hinton_...` `wsl-dkd_...` `wsl-nkd_...` `wsl-dist_...` | four of these with WSL's weights |
| `mmrazor_...` | MMRazor's own distiller and loss |
| `ablations/wsl-<weighting>_...` | another weight instead of WSL's: 1 (`one`), 0 for regularization samples (`drop`), \
0 for all others (`only`), WSL's weights assigned at random (`random`), L_t out of fold (`oof`), losses divided by \
their means (`free`) |
| `ablations/kd-entropy_...` | the teacher's entropy as weight |
| `..._cached` | reads the teacher's answers from a [cache](../docs/teacher_cache.md) |
| `..._device` | keeps the images on the GPU |
| `..._8e`, `..._eval` and other endings | how the recipe differs from the pair's usual one: 8 epochs, teacher in \
eval mode |

Three folders have pairs for other tasks, which are not scored by top-1 accuracy and therefore in no table here:

| folder | content |
| --- | --- |
| `multi/` | images with several labels (sigmoid heads, `BernoulliKD`) on scenes of digits, scored by mAP: teacher, \
student alone, plain and weighted soft labels |
| `seg/` | segmentation (extra `dense`, mIoU): the same, and MMRazor's channel-wise distillation |
| `det/` | detection (extra `dense`, mAP): the same, with WSL's weight times the factor \\|p_s - p_t\\| (`wsl`) and \
without it (`wsl-plain`) |

## What the methods have in common

The other methods have their authors' settings for the pair, which `_base_/distillers/<method>_*.py` states with their
source. They differ from the pair's `wsl_` config only in the method, so their teacher also predicts with batch
statistics. The methods' authors have it in eval mode: set `model.teacher_norm_eval=True`. DKD's warm-up, 20 of 240
epochs, is left out of short schedules. NKD's authors have no pair as small as ResNet-56 -> ResNet-20; the settings for
CIFAR-100 are theirs for ResNet-34 -> ResNet-18.

WSL's weights are only an option of a loss. This option turns `kd-hinton_` into `wsl-hinton_`:

    --cfg-options model.distiller.distill_losses.loss_kd.weighting.type=WSLWeighting

The CIFAR networks are those that papers on distillation compare, with the initial weights of their code. The networks
for ImageNet are mmpretrain's and timm's, with the initial weights of these packages: unlike the authors' code,
mmpretrain initialises the last normalisation of each ResNet block with zero, and a classifier from a normal
distribution with std 0.01.

## How to read the tables

Top-1 accuracy is in percent. *Published* figures are those of others, often of the best epoch on the test set, with
their source. *Measured* figures are this project's, of the last epoch: mean and standard deviation over seeds, with the
log of each run in `results/`. Parameters and multiply-adds (MACs, counted by mmengine for one image) are those of the
student, or of the network alone.

## Show a config

mmpretrain's commands show a config, its views, its learning rates and a run's log (with OpenMMLab's releases, write
`mmpretrain` for `onedl-mmpretrain`):

    mim run onedl-mmpretrain print_config configs/wsl_r56_r20_cifar100.py
    mim run onedl-mmpretrain browse_dataset configs/wsl_r56_r20_cifar100.py --mode original --not-show -o views -n 4
    mim run onedl-mmpretrain vis_scheduler configs/wsl_r56_r20_cifar100.py --dataset-size 50000 --not-show -s lr.png
    mim run onedl-mmpretrain analyze_logs plot_curve scalars.json --keys student.loss distill.loss_wsl --out loss.png

`browse_dataset` and `vis_scheduler` need a torchvision that fits torch (mmwsl works around one that does not fit, they
do not), and matplotlib 3.11 breaks the other modes of `browse_dataset`.
"""

Seeds = dict[int, dict]  # runs of one kind, by their seeds


@dataclass
class Entry:
    """One config."""

    name: str
    path: Path
    method: str
    teacher: str
    student: str
    dataset: str
    cfg: Config


def read_entries() -> list[Entry]:
    paths = [
        path for path in CONFIGS.rglob('*.py') if not {'_base_', *OTHER_TASKS} & set(path.relative_to(CONFIGS).parts)
    ]
    datasets, methods = list(DATASETS), list(METHODS)
    return sorted(
        (read_entry(path) for path in paths),
        key=lambda entry: (datasets.index(entry.dataset), methods.index(entry.method), entry.name),
    )


@functools.cache
def read_entry(path: Path) -> Entry:
    """Read a config, and what its name says."""
    method = path.stem.partition('_')[0] if path.parent == CONFIGS else path.parent.name
    words = path.stem.split('_')[0 if method == 'vanilla' else 1 :]
    place = next(place for place, word in enumerate(words) if word in DATASETS)
    networks = words[:place]
    if words[place] == 'digits':  # its name comes first, and a pair's two usual networks need none
        networks = [word for word in words[1:] if word in NETWORKS] or ['teacher', 'student']
    teacher = '' if method == 'vanilla' else NETWORKS[networks[0]]
    return Entry(
        path.stem, path.relative_to(ROOT), method, teacher, NETWORKS[networks[-1]], words[place], Config.fromfile(path)
    )


def recipe(cfg: Config) -> str:
    optimizer = cfg.optim_wrapper.optimizer
    more = ', cached teacher' if cfg.model.get('teacher_cache') else ''
    more += ', images on the device' if cfg.train_dataloader.dataset.type == 'mmwsl.DeviceDataset' else ''
    return (
        f'{optimizer.type}, lr {optimizer.lr:g}, {cfg.train_cfg.max_epochs} epochs, '
        f'batch {cfg.train_dataloader.batch_size}{more}'
    )


def count(entry: Entry) -> tuple[int, int]:
    """Return the parameters and MACs of the network that is trained."""
    network = entry.cfg.model.get('architecture', entry.cfg.model)
    return _count(json.dumps(network.to_dict()), DATASETS[entry.dataset][1])


@functools.cache
def _count(network: str, image: tuple[int, ...]) -> tuple[int, int]:
    init_default_scope('mmpretrain')
    model = MODELS.build(json.loads(network))
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        macs = get_model_complexity_info(model, image, show_table=False, show_arch=False)['flops']
    return sum(parameter.numel() for parameter in model.parameters()), int(macs)


def readme(entries: list[Entry], numbers: dict, results: dict) -> str:
    lines = [PROSE, f'## Parts of a name: {NAME}\n', table(('Part', 'Values', 'Left out'), PARTS), '']
    for dataset, (title, _) in DATASETS.items():
        for heading in dict.fromkeys(map(section, METHODS)):
            rows = [
                row(entry, numbers, results)
                for entry in sorted(entries, key=lambda entry: entry.name not in results)  # measured ones first
                if (entry.dataset, section(entry.method)) == (dataset, heading)
            ]
            if rows:
                lines += [
                    f'## {title}: {heading if heading.startswith("MM") else heading[0].lower() + heading[1:]}\n',
                    table(COLUMNS, rows),
                    '',
                ]
    return '\n'.join(lines).rstrip() + '\n'


def section(method: str) -> str:
    """Return the heading of the table that lists a method's configs."""
    return SECTIONS.get(method, METHODS[method])


def row(entry: Entry, numbers: dict, results: dict) -> tuple[str, ...]:
    parameters, macs = count(entry)
    top1, source = published(entry.name, numbers)
    runs = results.get(entry.name, [])
    return (
        f'[{entry.name}]({entry.path.relative_to("configs")})',
        entry.teacher,
        entry.student,
        recipe(entry.cfg),
        f'{parameters:,}',
        f'{macs / 1e6:.2f} M',
        f'{top1:.2f}' if top1 else '',
        source,
        mean_and_spread(runs),
        str(len(runs) or ''),
    )


def mean_and_spread(runs: list[dict]) -> str:
    """Return the mean last figure and its sample standard deviation; the mean alone for one run, '' for none."""
    top1 = [run['last'] for run in runs]
    spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
    return f'{statistics.mean(top1):.2f}{spread}' if top1 else ''


def each(runs: Iterable[dict]) -> str:
    return ', '.join(f'{run["last"]:.2f}' for run in runs)


def difference(first: Seeds, second: Seeds) -> str:
    """Return the mean of first - second over common seeds, with its standard error if there are three or more."""
    pairs = paired(first, second)
    error = f' ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.2f}' if len(pairs) > 2 else ''
    return f'{statistics.mean(pairs):+.2f}{error}' if pairs else ''


def paired(first: Seeds, second: Seeds) -> list[float]:
    """Return the differences of the last figure between runs of one seed, in order of seeds."""
    return [first[seed]['last'] - second[seed]['last'] for seed in sorted(first.keys() & second.keys())]


def read_runs() -> list[dict]:
    """Return all runs that are kept, in order of seeds.

    Raises:
        ValueError: If a run's log is not there.
    """
    kept = KeptRuns(RESULTS)
    runs, curves = kept.all(), kept.curves()
    for run in runs:
        if run['name'] not in curves:
            raise ValueError(f'{RESULTS / "curves.jsonl"} has no log of {run["name"]}')
    return sorted(runs, key=lambda run: run['seed'])


def telling_options(run: dict) -> list[str]:
    """Return the options of a run that are not NEUTRAL."""
    return [option for option in run['options'] if not NEUTRAL.match(option)]


def read_results() -> dict[str, list[dict]]:
    """Return the runs of each config with nothing set but the seed and what is NEUTRAL, in order of seeds."""
    found: dict[str, list[dict]] = {}
    for run in read_runs():
        if not run['settings'] and not telling_options(run):
            found.setdefault(run['config'], []).append(run)
    return found


def results_page(entries: list[Entry], results: dict) -> str:
    """Return docs/results.md, with its tables made again."""
    rows = [result_row(entry, runs) for entry in entries if (runs := results.get(entry.name))]
    made = table(('Config', 'Epochs', 'Top-1, %', 'Each run'), rows)
    text = with_table(PAGE.read_text(), 'results', 'results/catalogue', made)
    return with_table(text, 'differences', 'results/catalogue', differences(results))


def differences(results: dict) -> str:
    rows = []
    for name, configs in DIFFERENCES.items():
        pair = [{run['seed']: run for run in results.get(config, [])} for config in configs]
        rows.append((name, difference(*pair), ', '.join(f'{value:+.2f}' for value in paired(*pair))))
    return table(('CIFAR-100, 8 epochs', 'Mean', 'Each seed'), rows)


def result_row(entry: Entry, runs: list[dict]) -> tuple[str, ...]:
    return (f'`{entry.name}`', str(entry.cfg.train_cfg.max_epochs), mean_and_spread(runs), each(runs))


def published(name: str, numbers: dict) -> tuple[float | None, str]:
    found = [(theirs[name], source) for source, theirs in numbers.items() if name in theirs]
    return found[0] if found else (None, '')


def metafile(entries: list[Entry], results: dict) -> str:
    collections = [
        dict(Name=heading, README='configs/README.md', Paper=paper(method)) for method, heading in METHODS.items()
    ]
    content = dict(Collections=collections, Models=[model(entry, results) for entry in entries])
    return '# written by tools/results/catalogue.py\n' + yaml.safe_dump(content, sort_keys=False, width=120)


def paper(method: str) -> dict:
    title, number = PAPERS.get(method, WSL_PAPER)
    return dict(Title=title, URL=f'https://arxiv.org/abs/{number}')


def model(entry: Entry, results: dict) -> dict:
    parameters, macs = count(entry)
    facts: dict[str, Any] = {
        'Training Data': DATASETS[entry.dataset][0],
        'Epochs': entry.cfg.train_cfg.max_epochs,
        'Batch Size': entry.cfg.train_dataloader.batch_size,
        'Architecture': [entry.student],
        'Parameters': parameters,
        'FLOPs': macs,
    }
    if entry.teacher:
        facts['Teacher'] = entry.teacher
    described: dict[str, Any] = {
        'Name': entry.name,
        'In Collection': METHODS[entry.method],
        'Config': str(entry.path),
        'Metadata': facts,
    }
    if entry.name in results:
        accuracy = {'Top 1 Accuracy': round(statistics.mean(run['last'] for run in results[entry.name]), 2)}
        described['Results'] = [dict(Task='Image Classification', Dataset=facts['Training Data'], Metrics=accuracy)]
    return described


def catalogue() -> dict[Path, str]:
    """Return the contents of all files that are written.

    Raises:
        ValueError: If there is a number for a config that does not exist, or one without its log.
    """
    entries = read_entries()
    numbers, results = yaml.safe_load((CONFIGS / 'published.yml').read_text()), read_results()
    named = {name for theirs in numbers.values() for name in theirs} | set(results)
    named -= {path.stem for task in OTHER_TASKS for path in (CONFIGS / task).glob('*.py')}
    strangers = named - {entry.name for entry in entries}
    if strangers:
        raise ValueError(f'published.yml or results/ names configs that do not exist: {sorted(strangers)}')
    return {
        CONFIGS / 'README.md': readme(entries, numbers, results),
        CONFIGS / 'metafile.yml': metafile(entries, results),
        ROOT / 'model-index.yml': '# written by tools/results/catalogue.py\nImport:\n  - configs/metafile.yml\n',
        PAGE: results_page(entries, results),
        ROOT / 'docs/dense.md': dense_page(results),
    }


def dense_page(results: dict[str, list[dict]]) -> str:
    """Return docs/dense.md with its tables of runs."""
    page = (ROOT / 'docs/dense.md').read_text()
    for name, configs in DENSE.items():
        rows = [
            (label, mean_and_spread(runs), mean_and_spread([dict(last=run['best']) for run in runs]), each(runs))
            for config, label in configs.items()
            if (runs := results.get(config, []))
        ]
        made = table(('', 'Last epoch', 'Best epoch', 'Each run'), rows) if rows else 'No runs yet.'
        page = with_table(page, name, 'results/catalogue', made)
    return page


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, text in catalogue().items():
        with whole_file(path) as file:
            file.write(text.encode())
        print(path.relative_to(ROOT))


if __name__ == '__main__':
    main()
