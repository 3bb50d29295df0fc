"""Try MMRazor's own classification configs: whether each loads, trains, resumes and takes weighted soft labels.

Nothing is downloaded: the teachers' weights are random, and the images a few of noise. --write puts the table into
docs/mmrazor.md.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import mmrazor
import numpy as np
import torch
from add_wsl import fragment
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import DATASETS, init_default_scope
from mmpretrain.datasets import BaseDataset
from mmrazor.registry import MODELS
from train import main as train

from mmwsl.compat import kept_download
from mmwsl.utils import whole_file
from mmwsl.utils.text import table, with_table

CONFIGS = Path(mmrazor.__file__).parent / '.mim/configs/distill/mmcls'
PAGE = Path(__file__).resolve().parent.parent / 'docs/mmrazor.md'
IMAGES = 4
SIZES = {'byot_resnet18_8xb16_cifar100': 32, 'kd_logits_resnet50_mobilenet-v2_8xb32_in1k': 64}  # in pixels; others: 16
UNSAVED = ('default_hooks.checkpoint.interval=9', 'default_hooks.checkpoint.save_last=False')
STAGES = ('loads', 'trains', 'resumes', 'takes WSL')
_TRANSFER: dict[str, Any] = {f'model.distiller.connectors.loss_s4_{side}feat.out_channel': 8 for side in 'st'}
SMALLER: dict[str, dict[str, Any]] = {  # settings that belong together, by config
    'crd_neck_r50_r18_8xb16_cifar10': {
        'model.distiller.distill_losses.loss_crd.neg_num': 2,
        'model.distiller.distill_losses.loss_crd.sample_n': IMAGES,
    },
    'deit-base_regnety160_pt-16xb64_in1k': {
        'model.architecture.backbone.arch': 'deit-tiny',
        'model.architecture.backbone.img_size': 16,
        'model.architecture.head.in_channels': 192,
        'model.teacher.backbone.model_name': 'regnety_002',
        'model.teacher.backbone.pretrained': False,
        'model.teacher.head.in_channels': 368,
    },
    'factor-transfer_backbone_resnet50_resnet18_8xb16_cifar10_pretrain': _TRANSFER,
    'factor-transfer_backbone_resnet50_resnet18_8xb16_cifar10_train': _TRANSFER,
}
NOTES = {  # what a user has to know, by config
    'abloss_logits_resnet50_resnet18_8xb32_in1k': (
        'set its `pretrain_checkpoint` to the last checkpoint of `abloss_pretrain_...`'
    ),
    'crd_neck_r50_r18_8xb16_cifar10': 'its `teacher_ckpt` is the name of a file in the working directory',
    'deit-base_regnety160_pt-16xb64_in1k': (
        "timm's default weights have changed: set `model.teacher.backbone.model_name=regnety_160.deit_in1k`; images "
        "are mixed, so the weight uses the teacher's class"
    ),
}
GENERATED = (
    'needs a launcher, as in MMRazor: `tools/dist_train.sh CONFIG 1`; images have no labels, so the weight '
    "uses the teacher's class"
)


@dataclass
class Row:
    """The results for a config."""

    config: Path
    found: dict[str, bool] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[str, ...]:
        marks = ({True: 'yes', False: 'no', None: ''}[self.found.get(stage)] for stage in STAGES)
        return f'`{self.config.parent.name}/{self.config.name}`', *marks, '; '.join(self.reasons)


@DATASETS.register_module()
class Noise(BaseDataset):
    """A few images of noise, each of a class of its own."""

    def __init__(self, classes: int, size: int, pipeline: Iterable, test_mode: bool = False) -> None:
        self.size = size
        super().__init__(
            ann_file='',
            metainfo=dict(classes=[str(index) for index in range(classes)]),
            pipeline=pipeline,
            test_mode=test_mode,
            serialize_data=False,
        )

    def load_data_list(self) -> list[dict]:
        drawn = np.random.RandomState(0).randint(256, size=(IMAGES, self.size, self.size, 3), dtype=np.uint8)
        paths = [str(Path(f'{self.size}-{index}.png').resolve()) for index in range(IMAGES)]
        for path, image in zip(paths, drawn, strict=True):
            cv2.imwrite(path, image)
        return [
            dict(img=image, img_path=path, gt_label=index, sample_idx=index)
            for index, (path, image) in enumerate(zip(paths, drawn, strict=True))
        ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', type=Path, help='config files; default: those of the installed MMRazor')
    parser.add_argument('--write', action='store_true', help='write the table into docs/mmrazor.md')
    args = parser.parse_args()
    if args.configs and args.write:
        parser.error("--write is for the table of all of MMRazor's configs: leave the config files out")
    return args


def configs() -> list[Path]:
    """Return the installed MMRazor's configs for classification."""
    return sorted(CONFIGS.glob('*/*.py'))


def try_config(path: Path) -> Row:
    """Try a config in the working directory."""
    row = Row(path, reasons=[NOTES[path.stem]] if path.stem in NOTES else [])
    folder = Path(path.stem)
    folder.mkdir(exist_ok=True)
    actions: tuple[Callable[[Path, Path], None], ...] = (
        write_small,
        partial(train_small, steps=2),
        partial(train_small, steps=4),
        train_with_wsl,
    )
    for stage, action in zip(STAGES, actions, strict=True):
        reason = failure(action, path, folder)
        row.found[stage] = not reason
        if reason:
            row.reasons.append(reason)
            if stage != 'resumes':
                break
    if row.found['loads'] and 'generator' in Config.fromfile(folder / path.name).model:
        row.reasons.append(GENERATED)
    shutil.rmtree(folder)
    return row


def failure(action: Callable[[Path, Path], None], path: Path, folder: Path) -> str:
    """Return why an action fails, or ''; its log is kept in the folder."""
    with (folder / 'log').open('a') as log, redirect_stdout(log), redirect_stderr(log):
        try:
            action(path, folder)
        except Exception as error:  # whatever a config is broken by
            return str(error).partition('\n')[0] or type(error).__name__
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return ''


def write_small(path: Path, folder: Path) -> None:
    """Write a config for images of noise into the folder, and the weights that it loads."""
    cfg = Config.fromfile(path)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        shrink_data(cfg[name], SIZES.get(path.stem, 16))
    for settings in dicts(cfg.optim_wrapper):
        if 'lr' in settings:
            settings['lr'] = 1e-4  # small, for batches of two images
    cfg.param_scheduler = None
    by_epoch = cfg.train_cfg.get('by_epoch', True)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1) if by_epoch else dict(by_epoch=False, max_iters=2, val_interval=2)
    cfg.merge_from_dict(
        {'default_hooks.logger.interval': 1, 'default_hooks.checkpoint.interval': 1, **SMALLER.get(path.stem, {})}
    )
    write_weights(cfg)
    cfg.dump(folder / path.name)


def shrink_data(dataloader: ConfigDict, size: int) -> None:
    """Have a dataloader read noise, two images at a time."""
    dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    dataset = dataloader.dataset
    while 'dataset' in dataset:  # in configs of CRD
        dataset.neg_num = 2
        dataset = dataset.dataset
    for transform in dicts(dataset.pipeline):
        transform.update({key: size for key in ('scale', 'crop_size') if isinstance(transform.get(key), int)})
    classes = {'CIFAR10': 10, 'CIFAR100': 100}.get(dataset.type.rpartition('.')[2], 1000)
    kept = dict(pipeline=dataset.pipeline, test_mode=dataset.get('test_mode', False))
    dataset.clear()
    dataset.update(type='Noise', classes=classes, size=size, **kept)


def dicts(value: Any) -> Iterator[dict]:
    """Yield all dicts in a value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from dicts(inner)


def write_weights(cfg: Config) -> None:
    """Put random weights wherever a config loads some from."""
    init_default_scope('mmpretrain')
    model = cfg.model
    teachers = (
        [(model.teacher, model.get('teacher_ckpt'))]
        if 'teacher' in model
        else [(teacher.build_cfg, teacher.get('ckpt_path')) for teacher in model.get('teachers', {}).values()]
    )
    for network, checkpoint in teachers:
        if checkpoint:
            put(checkpoint, network)
        if 'cfg_path' in network and network.get('pretrained'):
            put(get_config(network.cfg_path, pretrained=True).model_path, network)
        head = network.get('head', {})
        if 'init_cfg' in head:
            shape = (head.num_classes, head.in_channels)
            torch.save(
                {'head.fc.weight': torch.zeros(shape), 'head.fc.bias': torch.zeros(shape[0])},
                place(head.init_cfg.checkpoint),
            )
    if 'init_cfg' in model:
        put(model.init_cfg.checkpoint, ConfigDict({key: value for key, value in model.items() if key != 'init_cfg'}))


def place(address: str) -> Path:
    """Return where a checkpoint is looked for, and make its folder."""
    path = kept_download(address) if '://' in address else Path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def put(address: str, network: ConfigDict) -> None:
    if not place(address).exists():
        config = {key: value for key, value in network.items() if key != 'pretrained'}
        place(address).hardlink_to(random_weights(json.dumps(config)))


@cache
def random_weights(network: str) -> Path:
    """Write random weights for a network, given its config as JSON, and return the file."""
    path = Path(f'weights-{len(list(Path().glob("weights-*")))}.pth').resolve()
    torch.save(dict(state_dict=MODELS.build(ConfigDict(json.loads(network))).state_dict()), path)
    return path


def train_small(path: Path, folder: Path, steps: int) -> None:
    """Train for a number of steps; if there are more than two, resume from the checkpoint of the second."""
    cfg, resumes = Config.fromfile(folder / path.name), steps > 2
    length = f'max_epochs={steps // 2}' if cfg.train_cfg.by_epoch else f'max_iters={steps}'
    work_dir = folder / 'run'  # where a run writes its config
    train(
        [
            str(folder / path.name),
            '--work-dir',
            str(work_dir),
            *(['--resume'] if resumes else []),
            *launcher(cfg),
            '--cfg-options',
            f'train_cfg.{length}',
            *(UNSAVED if resumes else []),
        ]
    )
    found = [line['step'] for line in logged(work_dir)]
    if found != list(range(1, steps + 1)):
        raise RuntimeError(f'steps {found} are logged, expected 1 to {steps}')


def train_with_wsl(path: Path, folder: Path) -> None:
    """Train two steps of what tools/add_wsl.py makes of the config."""
    cfg = Config.fromfile(folder / path.name)
    with_wsl = folder / f'{path.stem}_wsl.py'  # mmengine keeps visualizers by the config's name and the second
    with_wsl.write_text(fragment(cfg, path.name))
    train(
        [
            str(with_wsl),
            '--work-dir',
            str(folder / 'with_wsl'),
            '--no-validate',
            *launcher(cfg),
            '--cfg-options',
            *UNSAVED,
        ]
    )
    weights = [line.get('distill.wsl_weight') for line in logged(folder / 'with_wsl')]
    if len(weights) != 2 or not all(weight is not None and 0 <= weight <= 1 for weight in weights):
        raise RuntimeError(f'no weights of two steps are logged: {weights}')


def logged(work_dir: Path) -> list[dict]:
    """Return what a work dir's runs logged for training steps, in order."""
    lines = [
        json.loads(line)
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]
    return [line for line in lines if any('loss' in key for key in line)]


def launcher(cfg: Config) -> list[str]:
    """Return options for MMRazor's data-free distillation, which needs torch's wrapper around each of its networks."""
    if 'generator' not in cfg.model:
        return []
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return ['--launcher', 'pytorch']


def rows_of(rows: list[Row]) -> str:
    return table(('config', *STAGES, 'what to know'), [row.cells for row in rows])


def page(text: str, rows: list[Row]) -> str:
    """Return docs/mmrazor.md with its table replaced."""
    return with_table(text, 'configs', 'try_mmrazor', rows_of(rows))


def main() -> None:
    args = parse_args()
    paths = [path.resolve() for path in args.configs] or configs()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        torch.hub.set_dir(folder)
        rows = [try_config(path) for path in paths]
    if not args.write:
        print(rows_of(rows))
        return
    text = page(PAGE.read_text(), rows)
    with whole_file(PAGE) as file:
        file.write(text.encode())


if __name__ == '__main__':
    main()
