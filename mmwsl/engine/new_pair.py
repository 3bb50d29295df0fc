"""Choose networks and training settings for a folder of images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmwsl.datasets.image_folder import ImageFolder
from mmwsl.engine.named_networks import Trial, named_network, pretrained_start, try_network

_SMALL = 64  # images whose shorter edges are at most this are read at 32 pixels
_STEPS = 4000  # from scratch; an eighth of them from pretrained weights
_EPOCHS = 10, 200
_ON_A_CPU, _ON_A_GPU = 64, 256  # largest batches, for 32 pixels; a quarter of them for 224
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_REPEATED = 2  # distillations whose time a comparison counts: KD and WSL


@dataclass(frozen=True)
class Recipe:
    """Training settings, chosen for some data on this machine."""

    pixels: int
    batch: int
    workers: int
    epochs: int
    mean: list[float]
    std: list[float]
    seconds: dict[str, float]
    """Approximate time of each run: teacher, student, kd."""


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


def recipe(folder: ImageFolder, pixels: int, teacher: Network, student: Network, minutes: float) -> Recipe:
    """Choose batch size, workers, epochs and normalisation.

    Args:
        folder: The data.
        pixels: Edge of the images.
        teacher: Its step time counts for its own training, and its forward time for KD and WSL.
        student: Its step time counts for the student alone, KD and WSL.
        minutes: What all four runs together may take on this machine.
    """
    images, pretrained = len(folder.train), bool(teacher.start or student.start)
    largest = (_ON_A_GPU if torch.cuda.is_available() else _ON_A_CPU) // (1 if pixels == 32 else 4)
    batch = max(8, min(largest, 2 ** ((images // 25).bit_length() - 1) if images >= 25 else 8))
    least, most = _EPOCHS
    wanted = min(max(_STEPS * batch // images, least), most)
    seen = len(folder.val)
    an_epoch = dict(
        teacher=images * teacher.trial.training + seen * teacher.trial.forward,
        student=images * student.trial.training + seen * student.trial.forward,
    )
    an_epoch['kd'] = an_epoch['student'] + images * teacher.trial.forward
    together = an_epoch['teacher'] + an_epoch['student'] + _REPEATED * an_epoch['kd']
    epochs = max(5, min(wanted // 8 if pretrained else wanted, int(60 * minutes / together)))
    mean, std = IMAGENET if pretrained or pixels == 224 else folder.statistics()
    cores = os.cpu_count() or 1
    workers = min(8, cores) if torch.cuda.is_available() else cores // 4
    return Recipe(pixels, batch, workers, epochs, mean, std, {run: epochs * time for run, time in an_epoch.items()})
