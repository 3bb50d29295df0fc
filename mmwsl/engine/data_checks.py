"""Look for the data before a run is built, and say what is missing in the user's terms."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope

_CIFAR = {  # folder, its files, archive
    'CIFAR10': ('cifar-10-batches-py', (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta'),
                'cifar-10-python.tar.gz'),
    'CIFAR100': ('cifar-100-python', ('train', 'test', 'meta'), 'cifar-100-python.tar.gz'),
}
_FOLDERS = ('ImageNet', 'ImageNet21k', 'CustomDataset')


def check_data(cfg: Config, dataloaders: tuple[str, ...]) -> None:
    """Raise FileNotFoundError for the first dataset whose files are not there and cannot be downloaded.

    CIFAR is downloaded. A folder dataset cannot be. A dataset of another type is left to its own checks.
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
            _check_folder(dataset, field)


def _check_cifar(name: str, dataset: dict[str, Any], field: str) -> None:
    folder, files, archive = _CIFAR[name]
    root = Path(dataset.get('data_root') or dataset.get('data_prefix') or '')
    ranks = [os.environ[name] for name in ('RANK', 'OMPI_COMM_WORLD_RANK', 'SLURM_PROCID') if name in os.environ]
    first_process = ranks[:1] in ([], ['0'])
    # of several processes the first fetches; the dataset itself lets the others wait
    if not first_process or all((root / folder / file).is_file() for file in files):
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


def _check_folder(dataset: dict[str, Any], field: str) -> None:
    root = Path(dataset.get('data_root') or '')
    split, prefix = dataset.get('split', ''), dataset.get('data_prefix')
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path')
    folder = root / (prefix or split or '')
    if folder.is_dir() or '://' in str(dataset.get('data_root')):
        return
    raise FileNotFoundError(
        f'{field}: {folder} is not there. Expected: one folder for each class with its images, as in '
        f'{folder}/<class>/<image>.JPEG (or data_prefix with an annotation file in ann_file). It cannot be downloaded '
        f'by itself: ImageNet-1k needs a registration at image-net.org. Set {field}.dataset...data_root to where it is')
