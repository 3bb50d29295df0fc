"""Measure a teacher's hard loss on each training image, or fit a temperature to its logits; trains nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from mmwsl.analysis.calibration import Calibration, fit_temperature
from mmwsl.analysis.predict import batches, build_model, choose_network
from mmwsl.cache import TeacherLosses
from mmwsl.cache.fingerprint import files_hash, mixing, training_set
from mmwsl.datasets.fold import Fold
from mmwsl.engine.cache_building import collate
from mmwsl.functional import hard_loss
from mmwsl.utils.checkpoint import load_network
from mmwsl.utils.data import dataset_chain, sample_indices

_VIEWS = ('SeededViews', 'CachedViews', 'DeviceDataset')


class _Images(NamedTuple):
    """The training set as the network sees it: read by the validation pipeline, with the labels of training."""

    dataset: Any
    labels: Tensor
    fingerprint: str


def measure_losses(
    cfg: Config, checkpoints: Sequence[str] = (), out_of_fold: bool = False
) -> tuple[TeacherLosses, float]:
    """Return each training image's hard loss, computed by a network in eval mode on the validation pipeline.

    Args:
        cfg: Config of a network alone, or of a distillation, whose teacher is used.
        checkpoints: The network's; if empty, ``teacher_ckpt``. With out_of_fold, one for each fold in order: network k
            was trained by a config with ``mmwsl.Fold(fold=k)``.
        out_of_fold: Whether each image is given to the network that was trained without its fold. The config's Fold
            has the number and seed of the folds; without one there are as many as checkpoints, with seed 0.

    Returns:
        The losses, and the accuracy, in [0, 1].

    Raises:
        ValueError: If training mixes labels, an image has not exactly one class or no place of its own, a checkpoint is
            missing or does not fit, or folds are not those of the training set.
        RuntimeError: If the pipeline did not return each image of the training set exactly once.
    """
    images, (cfg, files) = _images(cfg), _network(cfg, checkpoints)
    folding = _folding(cfg, images.dataset, len(files)) if out_of_fold else {}
    parts = _held_out(images.dataset, range(len(files)), **folding) if folding else [images.dataset]
    # first, so that a missing file is found at once
    about = dict(
        kind='out of fold' if folding else 'teacher',
        tool='tools/teacher_losses.py',
        config=Path(cfg.filename or '').name,
        weights=files_hash(files or cfg.model.ckpts),
        **{name: str(number) for name, number in folding.items()},
    )
    losses = torch.empty(len(images.labels))
    answered, correct = np.zeros(len(losses), np.int64), 0
    for places, logits in _answers(cfg, files, parts):
        target = images.labels[places]
        losses[places] = hard_loss(logits.double(), target).float()
        np.add.at(answered, places, 1)
        correct += int((logits.argmax(1) == target).sum())
    _check_once(answered)
    return TeacherLosses(losses.numpy(), images.labels.numpy(), images.fingerprint, about), correct / len(losses)


def calibrate(cfg: Config, checkpoints: Sequence[str], fold: int | None = None) -> Calibration:
    """Return the temperature that fits a network's logits to training images that it was not trained on.

    Args:
        cfg: See :func:`measure_losses`.
        checkpoints: One for each fold in order; with ``fold`` a single one.
        fold: The fold that the one network was trained without; the config's Fold has the number and seed of the folds.

    Raises:
        ValueError: See :func:`measure_losses` and :func:`mmwsl.analysis.calibration.fit_temperature`.
    """
    images, (cfg, files) = _images(cfg), _network(cfg, checkpoints)
    folding = _folding(cfg, images.dataset, len(files) if fold is None else None)
    parts = _held_out(images.dataset, range(len(files)) if fold is None else [fold], **folding)
    places, logits = zip(*_answers(cfg, files, parts), strict=True)
    return fit_temperature(torch.cat(logits), images.labels[np.concatenate(places)])


def _images(cfg: Config) -> _Images:
    """Read the training set; raise ValueError if a file of losses cannot be used with it."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    chain = dataset_chain(cfg.train_dataloader.dataset)
    _refuse_mixing(cfg, chain)
    dataset = DATASETS.build(copy.deepcopy(chain[-1]))
    labels, fingerprint = training_set(dataset)
    dataset.pipeline = Compose(_validation_pipeline(cfg))
    return _Images(dataset, torch.from_numpy(labels), fingerprint)


def _name(config: Mapping) -> str:
    return str(getattr(config['type'], '__name__', config['type'])).rpartition('.')[2]


def _refuse_mixing(cfg: Config, chain: Sequence[Mapping]) -> None:
    """Raise ValueError if the pipeline, the data_preprocessor or a train_cfg mixes images."""
    found = [name for config in chain for name in mixing(config.get('pipeline', ()))]
    for holder in (cfg, cfg.model, cfg.model.get('architecture', {})):
        for mixer in ((holder.get('data_preprocessor') or {}).get('batch_augments'), holder.get('train_cfg')):
            augments = (mixer or {}).get('augments') or ()
            found += [_name(augment) for augment in ([augments] if isinstance(augments, Mapping) else augments)]
    if found:
        raise ValueError(
            f"{found[0]} mixes images and their labels in training, but a teacher's loss in a file belongs to "
            f'one image with one label. Leave {found[0]} out of the config (--cfg-options)'
        )


def _validation_pipeline(cfg: Config) -> Sequence[Any]:
    loader = cfg.get('val_dataloader') or {}
    pipeline = dataset_chain(loader.get('dataset') or {})[-1].get('pipeline')
    if not pipeline:
        raise ValueError(
            'images are read by the validation pipeline, and this config has none. Give it '
            'val_dataloader=dict(dataset=dict(pipeline=[...]))'
        )
    return pipeline


def _network(cfg: Config, checkpoints: Sequence[str]) -> tuple[Config, list[str]]:
    """Return the config of the network that is used, and its checkpoints: none for an ensemble with its own."""
    cfg = copy.deepcopy(cfg)
    own = choose_network(cfg, 'teacher', *checkpoints[:1])
    if own is None and not cfg.model.get('ckpts'):
        raise ValueError(f'{cfg.filename} is the config of a network alone. Give its checkpoint on the command line')
    return cfg, list(checkpoints or filter(None, [own]))


def _folding(cfg: Config, dataset: Any, count: int | None) -> dict[str, int]:
    """Return the number of folds and their seed, from the config's Fold or, without one, for ``count`` folds."""
    wrappers = [config for config in dataset_chain(cfg.train_dataloader.dataset)[:-1] if _name(config) not in _VIEWS]
    names = [_name(config) for config in wrappers]
    if names not in ([], ['Fold']):
        raise ValueError(
            'folds should be of the training set itself, inside nothing but mmwsl.SeededViews or mmwsl.DeviceDataset, '
            f'got {" around ".join(names)}. Remove what is not mmwsl.Fold'
        )
    if not wrappers and count is None:
        raise ValueError(
            '--fold needs the number of folds, and this config has no Fold. Give the config that CKPT was trained '
            "with, whose train_dataloader has a dict(type='mmwsl.Fold', folds=..., dataset=...)"
        )
    given = wrappers[0] if wrappers else dict(type='mmwsl.Fold', folds=count)
    fold = DATASETS.build({**given, 'dataset': dataset})
    if count not in (None, fold.folds):
        raise ValueError(f'{fold.folds} folds need as many checkpoints, in order, got {count}')
    return dict(folds=fold.folds, seed=fold.seed)


def _held_out(dataset: Any, chosen: Sequence[int], folds: int, seed: int) -> list[Fold]:
    return [Fold(dataset, fold, folds, held_out=True, seed=seed) for fold in chosen]


def _answers(cfg: Config, checkpoints: Sequence[str], parts: Sequence[Any]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places and logits of each batch of each part, by the network with that part's checkpoint."""
    network = build_model(cfg)
    with Progress() as progress:
        task = progress.add_task('predicting', total=sum(len(part) for part in parts))
        for checkpoint, part in zip(checkpoints or [''], parts, strict=True):
            if checkpoint:
                load_network(network, checkpoint)
            for inputs, data_samples in batches(network, _dataloader(part, cfg.val_dataloader)):
                with torch.no_grad():
                    logits = network(inputs, data_samples, mode='tensor').float().cpu()
                yield sample_indices(data_samples), logits
                progress.advance(task, len(data_samples))


def _dataloader(dataset: Any, loader: Mapping) -> DataLoader:
    """Return a dataloader like that of validation, but for images that are not kept on the device."""
    on_device = 'DeviceDataset' in map(_name, dataset_chain(loader['dataset']))
    return DataLoader(
        dataset,
        loader['batch_size'],
        num_workers=loader.get('num_workers', 0),
        collate_fn=collate({} if on_device else loader),
    )


def _check_once(answered: np.ndarray) -> None:
    wrong = np.flatnonzero(answered != 1)
    if len(wrong):
        raise RuntimeError(
            f'{len(wrong)} of {len(answered)} images were not read exactly once (image {wrong[0]}: '
            f'{answered[wrong[0]]} times). Check that the pipeline of val_dataloader can read all of them'
        )
