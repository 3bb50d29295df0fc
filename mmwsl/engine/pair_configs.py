"""Write the configs of a teacher and a student for a folder of images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmwsl.datasets.image_folder import ImageFile, ImageFolder
from mmwsl.engine.new_pair import IMAGENET, Network, Recipe
from mmwsl.utils.files import whole_file

_WIDTH = 110  # of a line in a config


def write_pair(
    out: Path,
    configs: Path,
    folder: ImageFolder,
    made: Recipe,
    teacher: Network,
    student: Network,
    teacher_ckpt: str | None = None,
) -> list[Path]:
    """Write the configs of WSL, KD, student and teacher and, if needed, lists of the images.

    Args:
        out: Folder for them.
        configs: The project's folder of configs, whose bases the new ones inherit.
        folder: The data.
        made: The training settings.
        teacher: The network that is trained on these data first.
        student: The network that learns from it.
        teacher_ckpt: File of a teacher that knows these classes already; no config to train it is written then.

    Returns:
        The files.
    """
    bases = Path(os.path.relpath(configs.resolve(), out.resolve())).as_posix() + '/_base_'
    work_dirs = f'work_dirs/{out.name}'
    files = {
        'wsl.py': _pair(out, bases, work_dirs, folder, made, teacher, student, teacher_ckpt),
        'kd.py': _kd(bases, work_dirs, made.pixels),
        'student.py': _alone('architecture', work_dirs, student),
    }
    if not teacher_ckpt:
        files['teacher.py'] = _alone('teacher', work_dirs, teacher) + _of_its_own(made, teacher, student)
    if folder.needs_lists:
        files.update({'train.txt': _list(folder.train), 'val.txt': _list(folder.val)})
    for name, text in files.items():
        with whole_file(out / name) as file:
            file.write(text.encode())
    return [out / name for name in files]


def _pair(
    out: Path,
    bases: str,
    work_dirs: str,
    folder: ImageFolder,
    made: Recipe,
    teacher: Network,
    student: Network,
    teacher_ckpt: str | None,
) -> str:
    classes = len(folder.classes)
    steps = len(folder.train) // made.batch
    ckpt = teacher_ckpt or f'{work_dirs}/teacher/epoch_{made.teacher_epochs}.pth'
    normalised = ("ImageNet's" if made.mean == IMAGENET[0] else 'of these training images') + ', RGB'
    return f"""# {teacher.name} teaches {student.name} on {folder.root.as_posix()}: {len(folder.train)} training and \
{len(folder.val)} validation images.
# Written by tools/new_pair.py, and yours to change. The other configs here read this one, so a change holds for all.
_base_ = ['{bases}/distillers/wsl_{_kind(made.pixels)}.py', '{bases}/default_runtime.py']

data_preprocessor = dict(
    type='ClsDataPreprocessor',
    num_classes={classes},
    mean={made.mean},  # {normalised}
    std={made.std},
    to_rgb=True)  # files are read as BGR

train_dataloader = dict(
    batch_size={made.batch},  # if memory runs out, halve it and lr
    num_workers={made.workers},  # processes that read images: more of them if a GPU waits for data
    persistent_workers={made.workers > 0},
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews',
        dataset=dict(
{_dataset(out, folder, 0)}
            pipeline=[
{_steps(_training_views(folder, made.pixels))}
            ])))

val_dataloader = dict(
    batch_size={2 * made.batch},
    num_workers={made.workers},
    persistent_workers={made.workers > 0},
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
{_dataset(out, folder, 1)[4:].replace(chr(10) + '    ', chr(10))}
        pipeline=[
{_steps(_validation_views(folder, made.pixels)).replace(chr(10) + '    ', chr(10))[4:]}
        ]))
val_evaluator = dict(type='Accuracy', topk={(1, 5) if classes >= 20 else (1,)})
test_dataloader = val_dataloader
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs={made.epochs}, val_interval=1)  # more of them usually help
val_cfg = dict()
test_cfg = dict()
{_optimiser(made, student)}
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.01, begin=0, end={max(1, steps)}),  # the first epoch
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, eta_min=0.0),
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture={_code({**student.config, **student.start}, 4)},
    teacher={_code(teacher.config, 4)},
    teacher_ckpt={ckpt!r},
    distiller=_base_.wsl)  # tau and loss_weight: model.distiller.distill_losses.loss_wsl

custom_hooks = [*_base_.custom_hooks, dict(type='mmwsl.ChannelsLastHook')]  # faster
work_dir = '{work_dirs}/wsl'
"""


def _kd(bases: str, work_dirs: str, pixels: int) -> str:
    return f"""# Plain soft labels in place of weighted ones.
_base_ = ['wsl.py', '{bases}/distillers/kd_{_kind(pixels)}.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
work_dir = '{work_dirs}/kd'
"""


def _alone(part: str, work_dirs: str, network: Network) -> str:
    name = 'teacher' if part == 'teacher' else 'student'
    pretrained = network.start if part == 'teacher' else {}
    start = f'\nmodel.update({_code(pretrained, 0)})  # pretrained' if pretrained else ''
    return f"""# The {name} alone, {network.name}.
_base_ = ['wsl.py']

model = dict(_delete_=True, **_base_.model.{part}){start}
work_dir = '{work_dirs}/{name}'
"""


def _of_its_own(made: Recipe, teacher: Network, student: Network) -> str:
    """Return the settings in which the teacher's training differs from a student's."""
    own, others = (_optimiser(made, network) for network in (teacher, student))
    optimiser = '' if own == others else own.replace('dict(', 'dict(_delete_=True, ', 1) + '\n'
    return (
        f'train_cfg = dict(max_epochs={made.teacher_epochs})  # and in the name of teacher_ckpt in wsl.py\n{optimiser}'
    )


def _optimiser(made: Recipe, network: Network) -> str:
    """Return SGD for a network with BatchNorm, otherwise AdamW; from pretrained weights with a tenth of the lr."""
    factor = 0.1 if network.start else 1.0
    if network.trial.has_batchnorm:
        rate = 0.1 * factor * made.batch / (128 if made.pixels == 32 else 256)
        return (
            f"optim_wrapper = dict(optimizer=dict(\n    type='SGD', lr={rate:.3g}, momentum=0.9, "
            'weight_decay=5e-4, nesterov=True))  # lr: try a third of it, and three times it'
        )
    rate = 1e-3 * factor * made.batch / 256
    return (
        f"optim_wrapper = dict(optimizer=dict(\n    type='AdamW', lr={rate:.3g}, weight_decay=0.05))"
        '  # lr: try a third of it, and three times it'
    )


def _kind(pixels: int) -> str:
    return 'cifar' if pixels == 32 else 'imagenet'


def _dataset(out: Path, folder: ImageFolder, part: int) -> str:
    if not folder.needs_lists:
        found = dict(data_root=folder.root.as_posix(), data_prefix=folder.prefixes[part])  # type: ignore[index]
    else:  # paths relative to data_prefix; a data_root would also be put before the list's
        found = dict(
            data_prefix=folder.root.as_posix(),
            ann_file=(out / ('train.txt', 'val.txt')[part]).as_posix(),
            metainfo=dict(classes=tuple(folder.classes)),
        )
    arguments = {'type': 'CustomDataset', **found}
    return '\n'.join(f'            {key}={_code(value, 12)},' for key, value in arguments.items())


def _training_views(folder: ImageFolder, pixels: int) -> list[tuple[dict, str]]:
    flip = dict(type='RandomFlip', prob=0.5, direction='horizontal'), '  # not for digits, letters or left and right'
    if pixels == 224:
        return [_read(), (dict(type='RandomResizedCrop', scale=224), ''), flip, _pack()]
    return [_read(), *_fitted(folder), (dict(type='RandomCrop', crop_size=32, padding=4), ''), flip, _pack()]


def _validation_views(folder: ImageFolder, pixels: int) -> list[tuple[dict, str]]:
    if pixels == 224:
        return [
            _read(),
            (dict(type='ResizeEdge', scale=256, edge='short'), ''),
            (dict(type='CenterCrop', crop_size=224), ''),
            _pack(),
        ]
    return [_read(), *_fitted(folder), _pack()]


def _read() -> tuple[dict, str]:
    return dict(type='LoadImageFromFile'), '  # grey images as three equal channels'


def _pack() -> tuple[dict, str]:
    return dict(type='PackInputs'), ''


def _fitted(folder: ImageFolder) -> list[tuple[dict, str]]:
    """Return the transforms that bring images of other sizes to 32 x 32 pixels."""
    if folder.sizes == {(32, 32)}:
        return []
    return [(dict(type='ResizeEdge', scale=32, edge='short'), ''), (dict(type='CenterCrop', crop_size=32), '')]


def _steps(steps: list[tuple[dict, str]]) -> str:
    return '\n'.join(f'                {_code(step, 16)},{comment}' for step, comment in steps)


def _list(images: list[ImageFile]) -> str:
    return ''.join(f'{image.path} {image.label}\n' for image in images)


def _code(value: Any, indent: int) -> str:
    """Return a value as a config writes it, broken into lines if it is long."""
    if isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value):
        parts, ends = [f'{key}={_code(item, indent + 4)}' for key, item in value.items()], ('dict(', ')')
    elif isinstance(value, list | tuple) and value:
        parts = [_code(item, indent + 4) for item in value]
        ends = ('[', ']') if isinstance(value, list) else ('(', ',)' if len(value) == 1 else ')')
    else:
        return repr(value)
    line = f'{ends[0]}{", ".join(parts)}{ends[1]}'
    if len(line) + indent <= _WIDTH and '\n' not in line:
        return line
    inner = ' ' * (indent + 4)
    return f'{ends[0]}\n{inner}' + f',\n{inner}'.join(parts) + ends[1]
