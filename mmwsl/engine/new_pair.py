"""Choose networks and training settings for a folder of images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmwsl.datasets.image_folder import ImageFolder
from mmwsl.engine.named_networks import Trial, named_network, pretrained_start, try_network
from mmwsl.engine.runs import roughly
from mmwsl.utils import load_weights, read_weights, student_weights
from mmwsl.utils.checkpoint import read_classes

_SMALL = 64  # images whose shorter edges are at most this are read at 32 pixels
_STEPS = 4000  # from scratch; an eighth of them from pretrained weights
_EPOCHS = 10, 200
_ON_A_CPU, _ON_A_GPU = 64, 256  # largest batches, for 32 pixels; a quarter of them for 224
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_SEEDS, _ARMS = 3, 3  # of the comparison that follows: student alone, KD and WSL
_BEGINNING = 11 * 5  # seconds until all runs have begun, on a CPU: teacher, its answers and nine students
_VIEWS = 16  # most views of each image that the teacher answers once for all students
_TEACHERS_SHARE = 1 / 3  # largest share of the time for training the teacher, which cannot teach what it does not know


@dataclass(frozen=True)
class Recipe:
    """Training settings, chosen for some data on this machine."""

    pixels: int
    batch: int
    workers: int
    epochs: int
    """Epochs of each student."""
    teacher_epochs: int
    """Epochs of the teacher; 0 if it is trained already."""
    usual: int
    """Epochs of a student if time did not matter."""
    views: int
    """Views of each image that the teacher answers once for all students."""
    mean: list[float]
    std: list[float]
    seconds: dict[str, float]
    """Estimated seconds of the teacher's training, of its answers ('views') and of each student's training."""

    def minutes(self, epochs: int) -> int:
        """Return how many minutes the whole comparison takes here if each student trains for so many epochs."""
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
    """Settings that its config needs to start from pretrained weights."""


def pixels_for(folder: ImageFolder) -> int:
    """Return the size in pixels at which a folder's images are read: 32 for small ones, otherwise 224."""
    return 32 if folder.edge <= _SMALL else 224


def get_network(name: str, folder: ImageFolder, pixels: int, bases: Path, start: str | None = None) -> Network:
    """Return a network by its name, after a trial step on this machine.

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
        teacher: The network that is trained first, and then answers views of the images once for all students.
        student: The network that is trained alone, by KD and by WSL, with three seeds each.
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
    mean, std = IMAGENET if pixels == 224 else folder.statistics()
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
