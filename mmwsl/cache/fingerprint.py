"""Fingerprints of a teacher, of images and of their pipeline, which do not depend on where these are stored."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from mmengine.hub import get_config
from torch import Tensor, nn

from mmwsl.utils.checkpoint import read_weights, student_weights

# locations and download settings: the same data elsewhere are the same data
_PLACES = ('data_root', 'data_prefix', 'ann_file', 'backend_args', 'download', 'ckpts', 'checkpoint')
_PACKAGES = ('mmwsl', 'torch', 'torchvision', 'mmengine', 'mmcv', 'mmpretrain', 'numpy', 'cv2', 'PIL')
_SETTINGS = ('mean', 'std', 'to_rgb', '_channel_conversion', 'pad_size_divisor', 'pad_value')
_MIXING = ('mixup', 'cutmix', 'mosaic')


def teacher_fingerprint(
    teacher: Mapping, teacher_ckpt: str | None, teacher_norm_eval: bool, data_preprocessor: nn.Module
) -> dict[str, Any]:
    """Return the fingerprint of a teacher, from its config: the network does not have to be built.

    Args:
        teacher: Config of the teacher.
        teacher_ckpt, teacher_norm_eval: As for ``WSLDistill``.
        data_preprocessor: The preprocessor that prepares the images.

    Returns:
        Fields by name. ``weights`` is None if there is no file to compare.
    """
    preprocessor = {name: _plain(getattr(data_preprocessor, name, None)) for name in _SETTINGS}
    return dict(
        config=_plain(teacher),
        weights=_weights_of_files(teacher, teacher_ckpt),
        teacher_norm_eval=teacher_norm_eval,
        data_preprocessor=preprocessor,
    )


def teacher_files(teacher: Any, teacher_ckpt: str | None) -> list[str]:
    """Return the checkpoints that a teacher is loaded from: its own, or one for each member of an ensemble.

    Args:
        teacher: Its config, or the built network.
        teacher_ckpt: As for ``WSLDistill``.
    """
    if teacher_ckpt or not isinstance(teacher, Mapping):
        return [str(teacher_ckpt)] if teacher_ckpt else []
    if teacher.get('cfg_path') and teacher.get('pretrained'):
        return [get_config(teacher['cfg_path'], pretrained=True).model_path]
    init_cfg = teacher.get('init_cfg')
    named = init_cfg.get('checkpoint') if isinstance(init_cfg, Mapping) else None
    return [named] if named else list(teacher.get('ckpts') or ())


def data_fingerprint(config: Mapping, dataset: Any) -> dict[str, Any]:
    """Return the fingerprint of a dataset: config and pipeline, labels, and images (or their names if they are files).

    Raises:
        ValueError: If its pipeline mixes images, or it has no ``get_data_info``.
    """
    refuse_mixing(config.get('pipeline', ()))
    if not hasattr(dataset, 'get_data_info'):
        raise ValueError(
            f'a teacher is cached for a dataset of mmengine or mmpretrain, got {config.get("type")}: remove '
            'this wrapper, and let mmwsl.SeededViews draw the views'
        )
    labels, images = hashlib.sha256(), hashlib.sha256()
    for info in _infos(dataset):
        labels.update(np.asarray(info.get('gt_label', ()), np.int64).tobytes())
        images.update(_image(info))
    return dict(length=len(dataset), config=_plain(config), labels=labels.hexdigest(), images=images.hexdigest())


def innermost(dataset: Any) -> Any:
    """Return the dataset inside all wrappers, to which ``sample_idx`` refers.

    Raises:
        ValueError: If several datasets are joined, or it has no ``get_data_info``.
    """
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    if hasattr(dataset, 'datasets'):
        raise ValueError(
            f'an image is looked up by its sample_idx, and a {type(dataset).__name__} uses the same indices in '
            'each of its parts: put the images into one dataset'
        )
    if not hasattr(dataset, 'get_data_info'):
        raise ValueError(
            "images are read with get_data_info(), which mmengine's and mmpretrain's datasets have and "
            f'{type(dataset).__name__} lacks: derive it from mmpretrain.BaseDataset'
        )
    return dataset


def training_set(dataset: Any) -> tuple[np.ndarray, str]:
    """Return a training set's labels, as training uses them, and a digest of its images, in order of ``sample_idx``.

    No image is decoded: labels come from ``get_data_info`` and pass through those transforms of the pipeline that have
    ``changes_labels = True``, which need only ``gt_label`` and ``sample_idx``.

    Args:
        dataset: The training set. Wrappers (views, folds, resamples) are looked through, to the innermost dataset.

    Returns:
        Labels, int64, (N, ), and a SHA-256 of the images or, if they are files, of their names.

    Raises:
        ValueError: If an image has no label or several, or as :func:`innermost`.
    """
    dataset = innermost(dataset)
    changes = [
        transform
        for transform in getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
        if getattr(transform, 'changes_labels', False)
    ]
    labels, images = np.empty(len(dataset), np.int64), hashlib.sha256()
    for index, info in enumerate(_infos(dataset)):
        images.update(_image(info))
        labels[index] = _label(info, changes)
    return labels, images.hexdigest()


def refuse_mixing(transforms: Iterable[Any]) -> None:
    """Raise ValueError for the first transform that mixes images."""
    for name in mixing(transforms):
        raise mixing_error(name)


def mixing(transforms: Iterable[Any]) -> list[str]:
    """Return the type of each transform that mixes images."""
    names = [str(transform.get('type')) for transform in transforms]
    return [name for name in names if any(word in name.lower() for word in _MIXING)]


def mixing_error(name: str) -> ValueError:
    """Return the error for a transform that mixes images, by its name."""
    return ValueError(
        f'{name} mixes images, and a teacher cache holds answers to single images. '
        f'Remove {name}, or run the teacher live (without teacher_cache)'
    )


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, types and bytes, which does not depend on their order or file."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if not name.endswith('num_batches_tracked'):  # old files lack it, and nothing reads it
            value = weights[name].detach().cpu().contiguous()
            digest.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_hash(files: Iterable[str]) -> str:
    """Return :func:`weights_hash` of the network in each checkpoint, in order; for a distillation's, of its student."""
    found = (read_weights(file) for file in files)
    return ' '.join(weights_hash(student_weights(weights) or weights) for weights in found)


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect views and logits."""
    return {name: str(importlib.import_module(name).__version__) for name in _PACKAGES}


def differences(cached: Any, current: Any, name: str = '') -> list[str]:
    """Describe each value that differs, by its dotted name."""
    if isinstance(cached, dict) and isinstance(current, dict):
        keys = [*cached, *(key for key in current if key not in cached)]
        pairs = [(key, cached.get(key), current.get(key)) for key in keys]
    elif isinstance(cached, list) and isinstance(current, list) and len(cached) == len(current):
        pairs = [(index, *pair) for index, pair in enumerate(zip(cached, current, strict=True))]
    else:
        return [] if cached == current else [f'{name} is {cached!r} in the cache and {current!r} here']
    return [found for key, old, new in pairs for found in differences(old, new, f'{name}.{key}'.lstrip('.'))]


def _weights_of_files(teacher: Mapping, teacher_ckpt: str | None) -> str | None:
    files = teacher_files(teacher, teacher_ckpt)
    if not files or not all(Path(file).is_file() for file in files):
        return None
    return files_hash(files)


def _infos(dataset: Any) -> Iterator[dict]:
    return (dataset.get_data_info(index) for index in range(len(dataset)))


def _label(info: Mapping, changes: Iterable[Callable]) -> int:
    sample = {key: info[key] for key in ('gt_label', 'sample_idx') if key in info}
    for change in changes:
        sample = change(sample)
    label = np.asarray(sample.get('gt_label', ()))
    if label.size != 1:
        raise ValueError(
            f'each image should have one class, got gt_label={sample.get("gt_label")} for image '
            f'{sample.get("sample_idx")}: several labels at once have no single loss. Use one class per image'
        )
    return int(label.item())


def _image(info: Mapping) -> bytes:
    if isinstance(info.get('img'), np.ndarray):
        return info['img'].tobytes()
    return '/'.join(PurePath(info.get('img_path', '')).parts[-2:]).encode()  # as a rule, class and file


def _plain(value: Any) -> Any:
    """Config values in the types of JSON, without locations."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _PLACES}
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
