"""Files of sample records: the weight of each sample in an epoch, and the terms that it was computed from."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mmwsl.utils.files import whole_file

RECORD = np.dtype([('index', 'i8'), ('w', 'f4'), ('L_s', 'f4'), ('L_t', 'f4'), ('a', 'f4'), ('b', 'f4')])
FOLDER = 'sample_records'


def write_records(records: np.ndarray, work_dir: str | Path, epoch: int) -> Path:
    """Write the records of an epoch, sorted by index, atomically.

    Args:
        records: Records of dtype :data:`RECORD`. Shape: (N, ).
        work_dir: Work dir of the run.
        epoch: Number of the epoch, counted from 1.

    Returns:
        Path of the file: ``<work_dir>/sample_records/epoch_<epoch>.npy``.
    """
    path = Path(work_dir) / FOLDER / f'epoch_{epoch}.npy'
    with whole_file(path) as file:
        np.save(file, records[np.argsort(records['index'], kind='stable')])
    return path


def read_records(work_dir: str | Path) -> dict[int, np.ndarray]:
    """Read the records of a run, by epoch in ascending order.

    Args:
        work_dir: Work dir of the run.

    Returns:
        Records of dtype :data:`RECORD` by epoch. Shape: (N, ) each.

    Raises:
        FileNotFoundError: If the run has no records.
        ValueError: If a file does not hold records.
    """
    files = {
        int(found[1]): path
        for path in (Path(work_dir) / FOLDER).glob('epoch_*.npy')
        if (found := re.fullmatch(r'epoch_(\d+)\.npy', path.name))
    }
    if not files:
        raise FileNotFoundError(
            f'{work_dir} has no {FOLDER}/epoch_N.npy. Train with --cfg-options '
            'default_hooks.sample_records.type=mmwsl.SampleRecordHook, or analyse a config with --checkpoints'
        )
    return {epoch: _read(files[epoch]) for epoch in sorted(files)}


def _read(path: Path) -> np.ndarray:
    records = np.load(path)
    if records.dtype != RECORD:
        raise ValueError(f'{path} should hold records of {RECORD.names}, got {records.dtype}')
    return records
