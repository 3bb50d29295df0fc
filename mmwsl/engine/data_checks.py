"""Check the data before a run is built, and explain what is missing or wrong."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope
from mmpretrain import datasets

from mmwsl.datasets.views import seeded_generators
from mmwsl.utils.data import dataset_chain, unwrapped
from mmwsl.utils.text import first_of

_CIFAR = {  # folder, its files, archive
    'CIFAR10': (
        'cifar-10-batches-py',
        (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta'),
        'cifar-10-python.tar.gz',
    ),
    'CIFAR100': ('cifar-100-python', ('train', 'test', 'meta'), 'cifar-100-python.tar.gz'),
}
# torch's messages; the second comes from a worker
_NOT_STACKED = ('stack expects each tensor to be equal size', 'resize storage that is not resizable')
_NOT_READ = 'failed to load image: '  # mmcv's
# what to change for images of several sizes
_ALIKE = (
    "Read all images with the same channels: dict(type='LoadImageFromFile', color_type='color') as the first step of "
    'its pipeline'
)
_RESIZED = (
    "Add dict(type='Resize', scale=(WIDTH, HEIGHT)), or dict(type='ResizeEdge', scale=SIZE) and "
    "dict(type='CenterCrop', crop_size=SIZE), before PackInputs in its pipeline"
)
_CROPPED = (
    "Add dict(type='mmseg.RandomCrop', crop_size=(HEIGHT, WIDTH)) before PackSegInputs in its pipeline, and set "
    'data_preprocessor.size=(HEIGHT, WIDTH) (SegDataPreProcessor), which pads smaller images'
)
_FETCH = {'bccd': ', or fetch it: python tools/fetch_bccd.py'}  # by the name of a folder
_FOLDERS = ('ImageNet', 'ImageNet21k', 'CustomDataset')


def check_data(cfg: Config, dataloaders: tuple[str, ...]) -> None:
    """Check the files of each dataset, and download CIFAR if it is missing.

    Of datasets other than CIFAR and folders of images, only the folder of those that have a list of images is checked.

    Raises:
        FileNotFoundError: If files are missing and cannot be downloaded.
        ValueError: If files are damaged or empty, or a hidden folder would become a class.
    """
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    for field in dataloaders:
        dataset = (cfg.get(field) or {}).get('dataset')
        if not isinstance(dataset, dict):
            continue
        dataset = dataset_chain(dataset)[-1]
        name = str(dataset.get('type')).rpartition('.')[2]
        if name in _CIFAR:
            _check_cifar(name, dataset, field)
        elif name in _FOLDERS:
            _check_folder(name, dataset, field)
        elif dataset.get('ann_file'):
            _check_root(dataset.get('data_root'), field)


def is_first_process() -> bool:
    """Whether this is the first process of a run, by the environment variables of torch, Open MPI and Slurm."""
    ranks = [os.environ[name] for name in ('RANK', 'OMPI_COMM_WORLD_RANK', 'SLURM_PROCID') if name in os.environ]
    return ranks[:1] in ([], ['0'])


def _check_cifar(name: str, dataset: dict[str, Any], field: str) -> None:
    folder, files, archive = _CIFAR[name]
    root = Path(dataset.get('data_root') or dataset.get('data_prefix') or '')
    # the first process downloads; the dataset makes the others wait
    if not is_first_process():
        return
    if all((root / folder / file).is_file() for file in files):
        _check_sums(name, root / folder, archive)
        return
    layout = f'{field}: {name} is not in {root}. Expected: {root / folder}/ with the files {", ".join(files)}.'
    if not dataset.get('download', True):
        raise FileNotFoundError(f'{layout} Set download=True in the dataset to fetch it')
    print_log(f'{layout} It is being downloaded.', logger='current')
    try:
        DATASETS.build(dataset)
    except Exception as error:  # a network can raise anything
        raise FileNotFoundError(
            f'{layout} Downloading it failed ({error}). Unpack {archive} from https://www.cs.toronto.edu/~kriz/ there'
        ) from error


def _check_sums(name: str, folder: Path, archive: str) -> None:
    """Raise ValueError for files that differ from the published ones, which the dataset would download again."""
    kind = getattr(datasets, name)
    damaged = [
        file
        for file, checksum in (*kind.train_list, *kind.test_list)
        if hashlib.md5((folder / file).read_bytes()).hexdigest() != checksum
    ]
    if damaged:
        raise ValueError(
            f'{folder} is damaged: {", ".join(damaged)} are not the published files, perhaps cut short. '
            f'Delete the folder and unpack {archive} again'
        )


def _check_folder(name: str, dataset: dict[str, Any], field: str) -> None:
    root = Path(dataset.get('data_root') or '')
    split, prefix = dataset.get('split', ''), dataset.get('data_prefix')
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path')
    folder = root / (prefix or split or '')
    if '://' in str(dataset.get('data_root')):
        return
    if folder.is_dir():
        if name == 'CustomDataset' and not dataset.get('ann_file'):
            _check_images(folder, dataset.get('with_label', True))
        return
    source = (
        ''
        if name == 'CustomDataset'
        else ' It cannot be downloaded automatically: ImageNet-1k needs a registration at image-net.org.'
    )
    raise FileNotFoundError(
        f'{field}: {folder} does not exist. Expected: one folder for each class with its images, as in '
        f'{folder}/<class>/<image>.jpg (or data_prefix with an annotation file in ann_file).{source} Set '
        f'{field}.dataset...data_root and data_prefix to its location'
    )


def _check_root(root: Any, field: str) -> None:
    if not root or '://' in str(root) or Path(root).is_dir():
        return
    fetch = _FETCH.get(Path(root).name, '')
    raise FileNotFoundError(f'{field}: {root} does not exist. Set {field}.dataset...data_root to its location{fetch}')


def _check_images(folder: Path, with_label: bool) -> None:
    """Raise ValueError for hidden folders, which would become classes, and for empty files."""
    hidden = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name.startswith('.'))
    if hidden and with_label:
        raise ValueError(
            f'{folder} has hidden folders, each of which would become a class: {", ".join(hidden)}. Delete them'
        )
    empty = sorted(
        str(Path(parent) / file)
        for parent, _, files in os.walk(folder)
        for file in files
        if not file.startswith('.') and os.path.getsize(os.path.join(parent, file)) == 0
    )
    if empty:
        raise ValueError(f'empty files are no images: {first_of(empty)}. Delete them, or copy them again')


@contextmanager
def explained_data(cfg: Config, dataloaders: tuple[str, ...]) -> Iterator[None]:
    """Explain errors of reading data in this context: name two images of unequal size, or a file that is no image.

    Args:
        cfg: The run's config.
        dataloaders: Names of the dataloaders to search.

    Raises:
        ValueError: In place of torch's RuntimeError and mmcv's AssertionError.
    """
    try:
        yield
    except AssertionError as error:
        found = re.findall(f'{_NOT_READ}(.*)', str(error))  # a worker puts its traceback first
        if not found:
            raise
        raise ValueError(
            f'{found[-1]} does not open as an image: it was cut short, or is something else. Copy it '
            'again or delete it; tools/new_pair.py --data FOLDER names all such files'
        ) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _NOT_STACKED):
            raise
        for field in dataloaders:
            if cfg.get(field):
                _raise_for_two_sizes(field, DATASETS.build(copy.deepcopy(cfg[field].dataset)), error)
        raise


def _raise_for_two_sizes(field: str, dataset: Any, error: RuntimeError) -> None:
    first: tuple[str, tuple[int, ...]] | None = None
    items = ((index, part[index]) for part in unwrapped(dataset) for index in range(len(part)))
    for index, item in items:
        name, shape = item['data_samples'].get('img_path') or f'image {index}', tuple(item['inputs'].shape)
        first = first or (name, shape)
        if shape != first[1]:
            advice = (
                _ALIKE if shape[0] != first[1][0] else _CROPPED if 'gt_sem_seg' in item['data_samples'] else _RESIZED
            )
            raise ValueError(
                f'{field}: the images of a batch should have one size, got {_size(first[1])} of '
                f'{first[0]} and {_size(shape)} of {name}. {advice}'
            ) from error


def _size(shape: tuple[int, ...]) -> str:
    return f'{shape[-1]} x {shape[-2]} pixels in {shape[0]} channel{"s" if shape[0] > 1 else ""}'


def check_labels(dataset: Any, classes: int | None, field: str) -> None:
    """Raise ValueError for labels outside the classes, which a loss would ignore (-100) or fail on.

    Images are not decoded.

    Args:
        dataset: A dataset, with or without wrappers. One without ``get_data_info`` is not checked.
        classes: Number of classes that are predicted. None: those that the dataset names.
        field: Name of its dataloader, for the message.
    """
    for part in unwrapped(dataset):
        known = classes or len(getattr(part, 'metainfo', {}).get('classes') or ())
        if known and hasattr(part, 'get_data_info'):
            _check_labels_of(part, known, field)


def _check_labels_of(part: Any, classes: int, field: str) -> None:
    infos = (part.get_data_info(index) for index in range(len(part)))
    wrong = {
        index: (label, info.get('img_path'))
        for index, info in enumerate(infos)
        for label in _integers(info.get('gt_label'))
        if not 0 <= label < classes
    }
    if not wrong or _is_mapped(part, next(iter(wrong)), classes):
        return
    index, (label, path) = next(iter(wrong.items()))
    more = f', and {len(wrong) - 1} more of {len(part)} images have such labels' if len(wrong) > 1 else ''
    ignored = ' Losses ignore -100, so it would train nothing.' if label == -100 else ''
    raise ValueError(
        f'{field}: {path or f"image {index}"} has the label {label}, which is none of {classes} classes (0 to '
        f'{classes - 1}){more}.{ignored} Correct the labels or leave these images out; if there are more classes, set '
        'num_classes of the heads (and of data_preprocessor)'
    )


def _is_mapped(part: Any, index: int, classes: int) -> bool:
    """Whether the pipeline maps a label outside the classes to a class."""
    with seeded_generators(0):
        sample = part[index].get('data_samples')
    labels = _integers(getattr(sample, 'gt_label', None))
    return bool(labels) and all(0 <= label < classes for label in labels)


def _integers(label: Any) -> list[int]:
    values = np.asarray(() if label is None else label)
    return values.reshape(-1).tolist() if values.dtype.kind in 'iu' else []
