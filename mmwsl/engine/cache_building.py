"""Build a teacher cache: run a config's teacher over views of its training set, and store its outputs."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_reduce, barrier, get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.registry import FUNCTIONS, MODELS, init_default_scope
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from mmwsl.cache.answers import AnswerFormat
from mmwsl.cache.fingerprint import (
    data_fingerprint,
    differences,
    mixing_error,
    teacher_fingerprint,
    versions,
    weights_hash,
)
from mmwsl.cache.store import (
    FORMAT,
    MANIFEST,
    CacheError,
    Manifest,
    Shard,
    missing_shards,
    strange_shards,
    verify_shard,
    write_shard,
)
from mmwsl.datasets.views import SeededViews, View
from mmwsl.models.algorithms import WSLDistill
from mmwsl.models.distillers.wsl_distiller import NOT_CACHED
from mmwsl.utils.data import single_labels
from mmwsl.utils.files import REMAINS, lock
from mmwsl.utils.text import first_of

SHARD_SIZE = 8192  # most images in a shard
_WRAPPERS = ('SeededViews', 'CachedViews')
_TIMED_BATCHES = 3


def build_cache(
    cfg: Config,
    folder: str | Path,
    views: int,
    seed: int = 0,
    top_k: int | None = None,
    dtype: str = 'float32',
    taus: Sequence[float] | None = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Fill a folder with a teacher's answers, or continue filling it, and verify all of them.

    Several processes divide the missing shards among them. A shard's content depends neither on the process that makes
    it nor on what was made before. Views can be added to a finished cache.

    Args:
        cfg: Config of a ``WSLDistill``, live or cached.
        folder: Where the cache goes.
        views: V, the number of augmented views of each image.
        seed: View v of image i is drawn from (seed, v, i).
        top_k: See :class:`AnswerFormat`.
        dtype: See :class:`AnswerFormat`.
        taus: See :class:`AnswerFormat`; None uses those of the config's losses.
        shard_size: Images in a shard, at most.

    Raises:
        CacheError: If the folder holds another cache, shards that are damaged or another's, or an incomplete cache of
            format 1, or if the disk is too small.
        RuntimeError: If another process is filling the folder.
        ValueError: If the config's model is no WSLDistill, images are mixed, or an image does not have exactly one
            class.
    """
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    model = build_model(cfg)
    loader = cfg.train_dataloader
    data_config = dataset_config(cfg)
    dataset = SeededViews(data_config)
    fingerprint = dict(teacher=_teacher_of(model, cfg), data=data_fingerprint(data_config, dataset))
    classes, seconds = _try_out(model, dataset, loader)
    manifest = Manifest(
        seed,
        views,
        len(dataset),
        math.ceil(len(dataset) / shard_size),
        AnswerFormat(classes, top_k, dtype, _taus(model, taus) if top_k else ()),
        None if model.teacher_norm_eval else loader.batch_size,
        fingerprint,
        versions(),
    )
    folder = Path(folder)
    with _alone(folder):
        manifest = _agree(folder, manifest)
        missing = missing_shards(folder, manifest)
        _check_what_is_there(folder, manifest, missing)
        _announce(folder, manifest, missing, seconds)
        barrier()  # each process has seen the same files
        _make_shards(folder, manifest, missing[get_rank() :: get_world_size()], model, dataset, loader)
        barrier()
        _finish(folder, manifest)


def dataset_config(cfg: Config) -> dict:
    """Return the config of the training set, without its wrapper for views."""
    dataset = cfg.train_dataloader.dataset
    return dataset.dataset if str(dataset.type).rpartition('.')[2] in _WRAPPERS else dataset


def build_model(cfg: Config) -> WSLDistill:
    """Build a distillation with its live teacher, in full precision because every later run reads its answers."""
    config = copy.deepcopy(cfg.model)
    config.pop('teacher_cache', None)
    if 'bf16' in config.get('teacher_speed', ''):
        config.teacher_speed = 'compile' if 'compile' in config.teacher_speed else 'fold'
    if config.get('data_preprocessor') is None:
        config.data_preprocessor = cfg.get('data_preprocessor')
    model = MODELS.build(config)
    if not isinstance(model, WSLDistill):
        raise ValueError(
            f'a teacher is cached from the config of an mmwsl.WSLDistill, got a {type(model).__name__}. Give '
            'the config of such a distillation'
        )
    if getattr(model.distiller, 'is_dense', False):
        raise ValueError(NOT_CACHED)
    mixing: Any = getattr(model.data_preprocessor, 'batch_augments', None)
    if mixing is not None:
        raise mixing_error(' and '.join(type(augment).__name__ for augment in mixing.augments))
    model.to(get_device())
    model.train()
    return model


def _teacher_of(model: WSLDistill, cfg: Config) -> dict[str, Any]:
    fingerprint = teacher_fingerprint(
        cfg.model.teacher, cfg.model.get('teacher_ckpt'), model.teacher_norm_eval, model.data_preprocessor
    )
    fingerprint['weights'] = fingerprint['weights'] or weights_hash(model.teacher.state_dict())
    return fingerprint


def _taus(model: WSLDistill, taus: Sequence[float] | None) -> tuple[float, ...]:
    if taus is None:
        taus = [loss.tau for loss in model.distiller.distill_losses.values() if hasattr(loss, 'tau')]
    return tuple(sorted({float(tau) for tau in taus}))


def _try_out(model: WSLDistill, dataset: SeededViews, loader: Mapping) -> tuple[int, float]:
    """Return the number of classes, and the seconds per view with the config's workers."""
    images = range(min(loader['batch_size'], len(dataset)))
    fetching, teaching = [], []
    for view in range(1 + _TIMED_BATCHES):
        start = time.perf_counter()
        batch = collate(loader)([dataset[View(image, view, 0)] for image in images])
        fetched = time.perf_counter()
        logits, _ = answers(model, batch)
        fetching.append(fetched - start)
        teaching.append(time.perf_counter() - fetched)
    # the first batch warms up
    fetch, teach = (sum(times[1:]) / _TIMED_BATCHES / len(images) for times in (fetching, teaching))
    workers = loader.get('num_workers', 0)
    return logits.shape[1], max(fetch / workers, teach) if workers else fetch + teach


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder, and delete files that killed processes have left half written."""
    if get_rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('a') as stream:
        lock(stream, f'another process is filling {folder}')
        for remains in folder.glob(REMAINS):
            remains.unlink()
        yield


def _agree(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, or compare it with the one in the folder; return it with as many views as asked."""
    if get_rank() == 0 and not (folder / MANIFEST).exists():
        if any(folder.glob('*.npy')):
            raise CacheError(
                f'{folder} holds shards, but no {MANIFEST} to describe them. Restore it, or choose another --out'
            )
        manifest.save(folder)
    barrier()
    there = Manifest.load(folder)
    found = differences(there.settings, manifest.settings)
    if there.views > manifest.views:
        found.append(f'views is {there.views} in the cache and {manifest.views} here')
    if found:
        raise CacheError(
            f'{folder} holds another cache: {"; ".join(found)}. Choose another folder (--out), or the settings that '
            'it was begun with'
        )
    there.warn_of_other_versions()
    return dataclasses.replace(there, views=manifest.views)


def _check_what_is_there(folder: Path, manifest: Manifest, missing: list[Shard]) -> None:
    """Raise CacheError for shards of another cache, and for a cache of format 1 that would have to be extended."""
    if missing and manifest.format < FORMAT:
        raise CacheError(
            f'{folder} holds a cache of format {manifest.format}, which can be read but not extended, '
            f'and {len(missing)} of {manifest.views * manifest.parts} shards are missing. Build a new cache in another '
            'folder (--out), or give no more --views than it has'
        )
    strange = strange_shards(folder, manifest)
    if strange:
        raise CacheError(
            f'{folder} holds {len(strange)} shards that are damaged or of another cache: '
            f'{first_of([shard.name for shard in strange])}. Delete them and repeat the command, '
            'or choose another folder (--out)'
        )


def _announce(folder: Path, manifest: Manifest, missing: list[Shard], seconds: float) -> None:
    count = sum(len(manifest.images(shard.part)) for shard in missing)
    size, free = count * manifest.answer_format.layout.itemsize, shutil.disk_usage(folder).free
    duration = timedelta(seconds=round(count * seconds / get_world_size()))
    print_log(
        f'{len(missing)} of {manifest.views * manifest.parts} shards are missing: {count:,} answers of '
        f'{manifest.answer_format.layout.itemsize} bytes, {size / 1e9:.2f} GB ({free / 1e9:.2f} GB are free), in about '
        f'{duration} with {get_world_size()} process(es).',
        'current',
    )
    if size > free:
        raise CacheError(
            f'{folder} has {free / 1e9:.2f} GB of free disk, and {size / 1e9:.2f} GB are needed. Use '
            'fewer --views, --top-k, --dtype float16 or another --out'
        )


def _make_shards(
    folder: Path, manifest: Manifest, shards: list[Shard], model: WSLDistill, dataset: SeededViews, loader: Mapping
) -> None:
    sampler: Any = _views(manifest, shards, loader['batch_size'])
    batches = iter(
        DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate(loader),
            num_workers=loader.get('num_workers', 0),
        )
    )
    with Progress(disable=get_rank() != 0) as progress:
        task = progress.add_task('teaching', total=sum(len(manifest.images(shard.part)) for shard in shards))
        for shard in shards:
            encoded = np.zeros(len(manifest.images(shard.part)), manifest.answer_format.layout)
            for rows in _batches(manifest, shard, loader['batch_size']):
                encoded[rows] = manifest.answer_format.encode(*answers(model, next(batches)))
                progress.advance(task, len(rows))
            write_shard(folder, manifest, shard, encoded)


def _views(manifest: Manifest, shards: list[Shard], batch_size: int) -> Iterator[list[View]]:
    for shard in shards:
        images = manifest.images(shard.part)
        for rows in _batches(manifest, shard, batch_size):
            yield [View(int(image), shard.view, manifest.seed) for image in images[rows]]


def _batches(manifest: Manifest, shard: Shard, batch_size: int) -> list[np.ndarray]:
    """Return the shuffled rows of each batch, nearly equal in number, since statistics of few images are poor."""
    count = len(manifest.images(shard.part))
    rows = np.random.default_rng((manifest.seed, shard.view, shard.part)).permutation(count)
    return np.array_split(rows, math.ceil(count / batch_size))


def collate(loader: Mapping) -> Any:
    """Return the function by which a dataloader with this config makes a batch of samples."""
    config = dict(loader.get('collate_fn') or dict(type='pseudo_collate'))
    return partial(FUNCTIONS.get(config.pop('type')), **config)


def answers(model: WSLDistill, batch: dict) -> tuple[Tensor, Tensor]:
    """Return the teacher's logits, (N, C), and the true classes, (N, ), on the CPU."""
    batch = model.data_preprocessor(batch, True)
    labels = single_labels(batch['data_samples'])
    if labels is None:
        raise ValueError(
            'a teacher is cached for images of one class each (gt_label), but one of these has none or several. Leave '
            'such images out of the training set'
        )
    logits = model.teacher_logits(batch['inputs'], batch['data_samples'])
    return logits.cpu(), labels


def _finish(folder: Path, manifest: Manifest) -> None:
    """Verify all shards, and store the teacher's accuracy in the manifest."""
    shards = list(manifest.shards)[get_rank() :: get_world_size()]
    correct = torch.tensor(sum(verify_shard(folder, manifest, shard) for shard in shards))
    all_reduce(correct)
    top1 = int(correct) / (manifest.views * manifest.length)
    if get_rank() == 0:
        dataclasses.replace(manifest, top1=top1).save(folder)
    barrier()
    print_log(f'The cache in {folder} is finished. The teacher gets {100 * top1:.2f} % of its views right.', 'current')
