"""From a folder of images to the configs of a teacher and a student."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmwsl.datasets.image_folder import ImageFile, ImageFolder
from mmwsl.engine.named_networks import Trial, named_network, pretrained_start, try_network
from mmwsl.engine.runs import roughly
from mmwsl.utils import load_weights, read_weights, student_weights
from mmwsl.utils.checkpoint import read_classes
from mmwsl.utils.files import whole_file

_SMALL = 64  # images whose shorter edges are at most this are read at 32 pixels
_STEPS = 4000  # of a network that learns from scratch; an eighth of them from a pretrained start
_EPOCHS = 10, 200
_ON_A_CPU, _ON_A_GPU = 64, 256  # largest batches, for 32 pixels; a quarter of them for 224
_IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_WIDTH = 110
_SEEDS, _ARMS = 3, 3  # of the comparison that follows: student alone, KD and WSL
_BEGINNING = 11 * 5  # seconds until all runs have begun, on a CPU: teacher, its answers and nine students
_VIEWS = 16  # of each image, at most, that the teacher answers once for all students
_TEACHERS_SHARE = 1 / 3  # of the time, at most, for its own training: what it does not know it cannot teach


@dataclass(frozen=True)
class Recipe:
    """The figures of a training, chosen for some data on this machine."""

    pixels: int
    batch: int
    workers: int
    epochs: int
    """Of each student."""
    teacher_epochs: int
    """0 if it is trained already."""
    usual: int
    """Epochs of a student if time did not matter."""
    views: int
    """Of each image, that the teacher answers once for all students."""
    mean: list[float]
    std: list[float]
    seconds: dict[str, float]
    """About: of the teacher's training, of its answers ('views') and of each student."""

    def minutes(self, epochs: int) -> int:
        """Return how long the whole comparison takes here if each student has some epochs."""
        students = _SEEDS * _ARMS * self.seconds['student'] * epochs / self.epochs
        return math.ceil((self.seconds['teacher'] + self.seconds['views'] + students + _BEGINNING) / 60)

    def describe(self) -> str:
        """Return the lines that tell a user what is trained for how long."""
        taught, learned = (roughly(self.seconds[part]) for part in ('teacher', 'student'))
        teacher = f'teacher {self.teacher_epochs} epochs ({taught}), ' if self.teacher_epochs else ''
        lines = [
            f'  {self.batch} images a step; {teacher}each student {self.epochs} epochs ({learned})',
            f'  {_SEEDS} seeds of student alone, KD and WSL: about {self.minutes(self.epochs)} min in all, '
            'if nothing else runs on this machine',
        ]
        if 2 * self.epochs < self.usual:
            lines.append(
                f'  {self.epochs} epochs are few: {self.usual} are usual for these images, and need '
                f'--minutes {self.minutes(self.usual)} or smaller networks'
            )
        return '\n'.join(lines)


@dataclass(frozen=True)
class Network:
    """A network of the pair."""

    name: str
    config: dict[str, Any]
    trial: Trial
    start: dict[str, Any]
    """What its config needs besides to begin with pretrained weights."""


def pixels_for(folder: ImageFolder) -> int:
    """Return the edge at which a folder's images are read: 32 for small ones, else 224."""
    return 32 if folder.edge <= _SMALL else 224


def get_network(name: str, folder: ImageFolder, pixels: int, bases: Path, start: str | None = None) -> Network:
    """Return a network by its name, tried with a step on this machine.

    Raises:
        ValueError: If there is no such network, it does not fit these data, or ``start`` does not fit it.
    """
    classes = len(folder.classes)
    config = named_network(name, classes, pixels, bases)
    trial = try_network(name, config, pixels, classes)
    return Network(name, config, trial, pretrained_start(config, trial.network, start) if start else {})


def check_trained(teacher: Network, path: str, classes: Sequence[str]) -> None:
    """Check that a file has a teacher's weights, trained on these classes in this order.

    Raises:
        ValueError: If they are of another network or number of classes, or the file names other classes.
    """
    advice = (
        f'--teacher-ckpt takes a {teacher.name} that predicts these {len(classes)} classes; one of other classes '
        'is where its training begins, by --teacher-start'
    )
    weights = read_weights(path)
    load_weights(teacher.trial.network, student_weights(weights) or weights, path, advice)
    named = read_classes(path)
    if named and list(named) != list(classes):
        raise ValueError(
            f'{path} predicts the classes {", ".join(named)}, in this order, and the folder has '
            f'{", ".join(classes)}. {advice}'
        )


def recipe(
    folder: ImageFolder, pixels: int, teacher: Network, student: Network, minutes: float, is_trained: bool = False
) -> Recipe:
    """Choose batch size, workers, epochs and normalisation.

    Args:
        folder: The data.
        pixels: Edge of the images.
        teacher: It learns first, and then answers views of the images once for all students.
        student: It learns alone, by KD and by WSL, with three seeds each.
        minutes: What all of this together may take here.
        is_trained: Whether the teacher knows the data already.
    """
    images, budget = len(folder.train), 60 * minutes - _BEGINNING
    batch = _batch(images, pixels)
    taught, learned = (_seconds_of_an_epoch(folder, network.trial) for network in (teacher, student))
    teachers, usual = (_usual_epochs(images, batch, network) for network in (teacher, student))
    teacher_epochs = 0 if is_trained else max(3, min(teachers, int(_TEACHERS_SHARE * budget / taught)))
    a_view, of_all = images * teacher.trial.forward, _SEEDS * _ARMS * learned
    left = budget - teacher_epochs * taught
    affordable = max(left / (of_all + a_view), (left - _VIEWS * a_view) / of_all)  # with a view each, or with _VIEWS
    epochs = max(5, min(usual, int(affordable)))
    views = min(epochs, _VIEWS)
    mean, std = _IMAGENET if pixels == 224 else folder.statistics()
    cores = os.cpu_count() or 1
    return Recipe(
        pixels=pixels,
        batch=batch,
        workers=min(8, cores) if torch.cuda.is_available() else cores // 4,
        epochs=epochs,
        teacher_epochs=teacher_epochs,
        usual=usual,
        views=views,
        mean=mean,
        std=std,
        seconds=dict(teacher=teacher_epochs * taught, views=views * a_view, student=epochs * learned),
    )


def _batch(images: int, pixels: int) -> int:
    largest = (_ON_A_GPU if torch.cuda.is_available() else _ON_A_CPU) // (1 if pixels == 32 else 4)
    return max(8, min(largest, 2 ** ((images // 25).bit_length() - 1) if images >= 25 else 8))


def _usual_epochs(images: int, batch: int, network: Network) -> int:
    least, most = _EPOCHS
    from_scratch = min(max(_STEPS * batch // images, least), most)
    return max(5, from_scratch // 8) if network.start else from_scratch


def _seconds_of_an_epoch(folder: ImageFolder, trial: Trial) -> float:
    return len(folder.train) * trial.training + len(folder.val) * trial.forward


def write_pair(
    out: Path,
    configs: Path,
    folder: ImageFolder,
    made: Recipe,
    teacher: Network,
    student: Network,
    teacher_ckpt: str | None = None,
) -> list[Path]:
    """Write the configs of WSL, KD, student and teacher, and lists of the images if they are needed.

    Args:
        out: Folder for them.
        configs: The project's, whose bases they read.
        folder: The data.
        made: The figures.
        teacher: Learns on these data first.
        student: Learns from it.
        teacher_ckpt: File of a teacher that knows these classes already; there is then no config that trains it.

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
    normalised = ("ImageNet's" if made.mean == _IMAGENET[0] else 'of these training images') + ', RGB'
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
    batch_size={made.batch},  # half of it if memory runs out, and half of lr then
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
    """Return what of the teacher's training differs from a student's."""
    own, others = (_optimiser(made, network) for network in (teacher, student))
    optimiser = '' if own == others else own.replace('dict(', 'dict(_delete_=True, ', 1) + '\n'
    return (
        f'train_cfg = dict(max_epochs={made.teacher_epochs})  # and in the name of teacher_ckpt in wsl.py\n{optimiser}'
    )


def _optimiser(made: Recipe, network: Network) -> str:
    """SGD as in the field's recipes for networks with BatchNorm, AdamW for others; a tenth of lr from a start."""
    factor = 0.1 if network.start else 1.0
    if network.trial.has_batchnorm:
        rate = 0.1 * factor * made.batch / (128 if made.pixels == 32 else 256)
        return (
            f"optim_wrapper = dict(optimizer=dict(\n    type='SGD', lr={rate:.3g}, momentum=0.9, "
            'weight_decay=5e-4, nesterov=True))  # lr: try a third and three times of it'
        )
    rate = 1e-3 * factor * made.batch / 256
    return (
        f"optim_wrapper = dict(optimizer=dict(\n    type='AdamW', lr={rate:.3g}, weight_decay=0.05))"
        '  # lr: try a third and three times of it'
    )


def _kind(pixels: int) -> str:
    return 'cifar' if pixels == 32 else 'imagenet'


def _dataset(out: Path, folder: ImageFolder, part: int) -> str:
    if not folder.needs_lists:
        found = dict(data_root=folder.root.as_posix(), data_prefix=folder.prefixes[part])  # type: ignore[index]
    else:  # paths below data_prefix; a data_root would stand before the list, too
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
    """What brings images of other sizes to 32 x 32 pixels."""
    if folder.sizes == {(32, 32)}:
        return []
    return [(dict(type='ResizeEdge', scale=32, edge='short'), ''), (dict(type='CenterCrop', crop_size=32), '')]


def _steps(steps: list[tuple[dict, str]]) -> str:
    return '\n'.join(f'                {_code(step, 16)},{comment}' for step, comment in steps)


def _list(images: list[ImageFile]) -> str:
    return ''.join(f'{image.path} {image.label}\n' for image in images)


def _code(value: Any, indent: int) -> str:
    """Return a value as a config has it, broken into lines if it is long."""
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
