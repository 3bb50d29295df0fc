"""Helpers for datasets, data samples and dataloaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor

_STACKING = ('mmseg.', 'mmdet.', 'SegDataPreProcessor', 'DetDataPreprocessor')


def dataset_chain(dataset: Mapping) -> list[Any]:
    """Return the configs of a dataset and of what it wraps, the outermost first."""
    chain = [dataset]
    while isinstance(chain[-1].get('dataset'), Mapping):
        chain.append(chain[-1]['dataset'])
    return chain


def single_labels(data_samples: Any) -> Tensor | None:
    """Return the class of each sample, on the CPU, (N, ); None unless each has exactly one."""
    labels = [getattr(sample, 'gt_label', None) for sample in data_samples or [None]]
    single = [label.reshape(1) for label in labels if label is not None and label.numel() == 1]
    return torch.cat(single).cpu() if len(single) == len(labels) else None


def sample_indices(data_samples: Sequence[Any]) -> list[Any]:
    """Return the index of each sample in its dataset, counted through all parts of a joined one.

    Raises:
        ValueError: If a sample has no ``sample_idx``.
    """
    indices = [sample.metainfo.get('sample_idx') for sample in data_samples]
    if None in indices:
        raise ValueError(
            "an image has no sample_idx: keep 'sample_idx' in meta_keys of PackInputs (it is there by "
            'default), and use a dataset of mmengine or mmpretrain'
        )
    return indices


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device; to a GPU from pinned memory, so that the host does not wait."""
    if torch.device(device).type != 'cuda' or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@torch.compiler.disable  # it loops over all samples
def send_batch(preprocessor: Any, args: tuple) -> tuple | None:
    """Send a batch to a GPU: images, labels and scores in one copy each, for which the host does not wait.

    A forward pre-hook of a data preprocessor. mmpretrain's ClsDataPreprocessor has no ``non_blocking``, and copies
    labels from memory that is not pinned.
    """
    if preprocessor.device.type != 'cuda' or not args or not isinstance(args[0], Mapping):
        return None
    data, *rest = args
    for name in ('gt_label', 'gt_score'):
        _send_field(data.get('data_samples') or [], name, preprocessor.device)
    inputs = data.get('inputs')
    sent = to_device(inputs, preprocessor.device) if isinstance(inputs, Tensor) else inputs
    return {**data, 'inputs': sent}, *rest


def _send_field(data_samples: Sequence[Any], name: str, device: torch.device) -> None:
    """Move a field of all samples, as a preprocessor would, in place."""
    values: list[Any] = [getattr(sample, name, None) for sample in data_samples]
    if not values or not all(isinstance(value, Tensor) and value.dim() == 1 for value in values):
        return
    sent = to_device(torch.cat(values), device).split([len(value) for value in values])
    for sample, value in zip(data_samples, sent, strict=True):
        sample.set_field(value, name)


def set_dataloader_defaults(dataloader: ConfigDict, pin_memory: bool, collate: str = 'default_collate') -> None:
    """Fill in what a dataloader's config leaves open, in place."""
    dataloader.pin_memory = pin_memory and dataloader.get('pin_memory', True) and torch.cuda.is_available()
    dataloader.setdefault('collate_fn', dict(type=collate))
    # without workers there is nothing to keep alive, and torch refuses the option
    dataloader.persistent_workers = dataloader.get('num_workers', 0) > 0 and dataloader.get('persistent_workers', True)


def collate_for(cfg: Config) -> str:
    """Return the name of the function that makes batches for a config's data_preprocessor.

    It is 'pseudo_collate' for those of mmseg and mmdet, which stack images themselves and pad unequal ones, otherwise
    'default_collate'.
    """
    model = cfg.get('model') or {}
    kinds = [
        str((part.get('data_preprocessor') or {}).get('type')) for part in (cfg, model, model.get('architecture') or {})
    ]
    return 'pseudo_collate' if any(name in kind for name in _STACKING for kind in kinds) else 'default_collate'


def unwrapped(dataset: Any) -> list[Any]:
    """Return the datasets inside all wrappers, in order: one, or several that are concatenated."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    if not hasattr(dataset, 'datasets'):
        return [dataset]
    return [found for part in dataset.datasets for found in unwrapped(part)]


def number_images(dataset: Any) -> None:
    """Let ``sample_idx`` count on through all parts of a concatenated dataset; mmengine starts each part at 0.

    A dataset of one part is not changed, and a second call changes nothing.
    """
    parts = unwrapped(dataset)
    first = 0
    for part in parts if len(parts) > 1 else ():
        if hasattr(part, 'get_data_info'):
            part.get_data_info = partial(_numbered_info, part, first)
        first += len(part)


def _numbered_info(part: Any, first: int, index: int) -> dict:
    info = type(part).get_data_info(part, index)
    return {**info, 'sample_idx': first + info['sample_idx']}
