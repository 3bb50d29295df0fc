"""Look for the data before a run is built, and say what is missing in the user's terms."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope
from mmpretrain import datasets

from mmwsl.utils.text import first_of

_CIFAR = {  # folder, its files, archive
    'CIFAR10': ('cifar-10-batches-py', (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta'),
                'cifar-10-python.tar.gz'),
    'CIFAR100': ('cifar-100-python', ('train', 'test', 'meta'), 'cifar-100-python.tar.gz'),
}
_FOLDERS = ('ImageNet', 'ImageNet21k', 'CustomDataset')


def check_data(cfg: Config, dataloaders: tuple[str, ...]) -> None:
    """Look at the files of each dataset, and download CIFAR where it is not there.

    A dataset of another type than CIFAR or folders of images is left to its own checks.

    Raises:
        FileNotFoundError: If files are not there and cannot be downloaded.
        ValueError: If files are damaged or empty, or a hidden folder would become a class.
    """
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    for field in dataloaders:
        dataset = (cfg.get(field) or {}).get('dataset')
        while isinstance(dataset, dict) and isinstance(dataset.get('dataset'), dict):  # wrappers
            dataset = dataset['dataset']
        if not isinstance(dataset, dict):
            continue
        name = str(dataset.get('type')).rpartition('.')[2]
        if name in _CIFAR:
            _check_cifar(name, dataset, field)
        elif name in _FOLDERS:
            _check_folder(name, dataset, field)


def is_first_process() -> bool:
    """Whether this is the first process of a run, by what torch, Open MPI and slurm say in the environment."""
    ranks = [os.environ[name] for name in ('RANK', 'OMPI_COMM_WORLD_RANK', 'SLURM_PROCID') if name in os.environ]
    return ranks[:1] in ([], ['0'])


def _check_cifar(name: str, dataset: dict[str, Any], field: str) -> None:
    folder, files, archive = _CIFAR[name]
    root = Path(dataset.get('data_root') or dataset.get('data_prefix') or '')
    # of several processes the first fetches; the dataset itself lets the others wait
    if not is_first_process():
        return
    if all((root / folder / file).is_file() for file in files):
        _check_sums(name, root / folder, archive)
        return
    layout = (f'{field}: {name} is not in {root}. Expected: {root / folder}/ with the files '
              f'{", ".join(files)}.')
    if not dataset.get('download', True):
        raise FileNotFoundError(f'{layout} Set download=True in the dataset to fetch it')
    print_log(f'{layout} It is being downloaded.', logger='current')
    try:
        DATASETS.build(dataset)
    except Exception as error:  # whatever a network can raise
        raise FileNotFoundError(f'{layout} Downloading it failed ({error}). Unpack {archive} from '
                                'https://www.cs.toronto.edu/~kriz/ there') from error


def _check_sums(name: str, folder: Path, archive: str) -> None:
    """Raise ValueError for files that are there and not what was published: the dataset would download them again."""
    kind = getattr(datasets, name)
    damaged = [file for file, checksum in (*kind.train_list, *kind.test_list)
               if hashlib.md5((folder / file).read_bytes()).hexdigest() != checksum]
    if damaged:
        raise ValueError(f'{folder} is damaged: {", ".join(damaged)} are not the published files, perhaps cut short. '
                         f'Delete the folder and unpack {archive} again')


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
    source = ('' if name == 'CustomDataset' else
              ' It cannot be downloaded automatically: ImageNet-1k needs a registration at image-net.org.')
    raise FileNotFoundError(
        f'{field}: {folder} is not there. Expected: one folder for each class with its images, as in '
        f'{folder}/<class>/<image>.jpg (or data_prefix with an annotation file in ann_file).{source} Set '
        f'{field}.dataset...data_root and data_prefix to where it is')


def _check_images(folder: Path, with_label: bool) -> None:
    """Raise ValueError for hidden folders, which would become classes, and for empty files."""
    hidden = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name.startswith('.'))
    if hidden and with_label:
        raise ValueError(f'{folder} has hidden folders, each of which would become a class: {", ".join(hidden)}. '
                         'Delete them')
    empty = sorted(str(Path(parent) / file) for parent, _, files in os.walk(folder) for file in files
                   if not file.startswith('.') and os.path.getsize(os.path.join(parent, file)) == 0)
    if empty:
        raise ValueError(f'empty files are no images: {first_of(empty)}. Delete them, or copy them again')
