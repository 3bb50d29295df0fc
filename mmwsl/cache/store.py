"""How records lie on disk, and how they are read.

A cache is a folder with ``cache.json``, which says what it is, and one ``.npy`` file of records for each *shard*: a
view and a part of the images. Image i lies in part ``i % parts`` at row ``i // parts``, so that each part is a fair
sample even of images that are sorted by class. A file appears whole or not at all. Each record carries a checksum,
which also covers the cache that it is of, its seed, view and image, and is compared at each read: nothing has to be
scanned at the start. Checksums of format 1 did not cover the cache: it is read, and not extended.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.logging import print_log

from mmwsl.cache.fingerprint import differences, versions
from mmwsl.cache.records import RecordFormat
from mmwsl.utils.files import whole_file

MANIFEST = 'cache.json'
FORMAT = 2
_READ = (1, FORMAT)
_OPEN = 512  # files at once in a process, which may have 1,024 on most machines
_AGAIN = 'run tools/cache_teacher.py again'


class CacheError(RuntimeError):
    """A teacher cache cannot be used as it is; the message says why, and what to do."""


class Shard(NamedTuple):
    """A file of records: a part of the images, in one view."""

    view: int
    part: int

    @property
    def name(self) -> str:
        return f'{self.view:04}-{self.part:05}.npy'


class TeacherRecord(NamedTuple):
    """What a sample carries from the dataset to the model."""

    data: bytes
    cache: str
    """``Manifest.identity`` of the cache it is from."""


@dataclass
class Manifest:
    """What a cache is."""

    seed: int
    """A view is drawn from (seed, view, image)."""
    views: int
    length: int
    """Number of images."""
    parts: int
    record: RecordFormat
    batch_size: int | None
    """Of the teacher, where it predicts with batch statistics."""
    fingerprint: dict[str, dict]
    """Of ``teacher`` and ``data``."""
    versions: dict[str, str]
    top1: float | None = None
    """The teacher's, in [0, 1], on all recorded views; None until the cache is finished."""
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """The same for caches with the same records, however many views they have."""
        return _digest(self.settings)[:16]

    @property
    def settings(self) -> dict[str, Any]:
        """What may not change from one building run to the next."""
        free = ('views', 'versions', 'top1', 'format')
        return {name: value for name, value in _to_json(self).items() if name not in free}

    @functools.cached_property
    def owner(self) -> int:
        """What a record's checksum begins with: a number of this cache alone."""
        return zlib.crc32(self.identity.encode()) if self.format > 1 else 0

    @property
    def shards(self) -> Iterator[Shard]:
        return (Shard(view, part) for view in range(self.views) for part in range(self.parts))

    def images(self, part: int) -> np.ndarray:
        """Indices of a part's images, by row."""
        return np.arange(part, self.length, self.parts)

    def save(self, folder: Path) -> None:
        content = _to_json(self)
        text = json.dumps({'checksum': _checksum(content), **content}, indent=1, sort_keys=True)
        with whole_file(folder / MANIFEST) as file:
            file.write(text.encode())

    def warn_of_other_versions(self) -> None:
        """Log what is older than this process or newer: its format, and the libraries that made it."""
        if self.format < FORMAT:
            print_log(
                f'The teacher cache is of format {self.format}, whose shards do not tell from which cache they '
                "are: a file of another teacher's cache copied into it would go unnoticed. It is read, and not "
                'extended.',
                'current',
                logging.WARNING,
            )
        found = differences(self.versions, versions())
        if found:
            print_log(
                f'The teacher cache was made with other versions: {"; ".join(found)}. Views may be drawn '
                'otherwise now.',
                'current',
                logging.WARNING,
            )

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises CacheError where there is none, or it is damaged or of another format."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            found, checksum = content['format'], content.pop('checksum')
        except FileNotFoundError as error:
            raise CacheError(
                f'there is no teacher cache in {folder}: make one with tools/cache_teacher.py CONFIG '
                f'--views V --out {folder}'
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CacheError(f'{path} is damaged ({error!r}): restore it, or make the cache anew') from error
        if found not in _READ:
            raise CacheError(
                f'{path} is of format {found!r}, and this version of mmwsl reads {_READ}: make the cache anew'
            )
        if checksum != _checksum(content):
            raise CacheError(f'{path} is damaged (its checksum does not fit): restore it, or make the cache anew')
        record = content.pop('record')
        return cls(record=RecordFormat(**{**record, 'taus': tuple(record['taus'])}), **content)


class TeacherCache:
    """A finished cache, open for reading.

    Args:
        folder: Where ``tools/cache_teacher.py`` made it.

    Raises:
        CacheError: If it is missing, unfinished, damaged or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.identity = self.manifest.identity
        self._check_complete()
        self._view = -1
        self._shards: dict[int, _OpenShard] = {}  # of this view: all of them would be too many open files

    def read(self, view: int, image: int) -> TeacherRecord:
        """The record of an image's view.

        Raises:
            CacheError: If it is damaged, or another's.
        """
        if view != self._view:
            self._view, self._shards = view, {}
        row, part = divmod(image, self.manifest.parts)
        if part not in self._shards:
            if len(self._shards) >= _OPEN:
                self._shards.clear()
            self._shards[part] = _OpenShard(self.folder, self.manifest, Shard(view, part))
        data = self._shards[part].read(row)
        if _crc(data, self.manifest, view, image) != int.from_bytes(data[-4:], 'little'):
            raise _damaged(self.folder / Shard(view, part).name, f'record {row}')
        return TeacherRecord(data, self.identity)

    def check(self, part: str, current: dict[str, Any]) -> None:
        """Compare a part of the fingerprint, 'teacher' or 'data', with that of a run.

        Raises:
            CacheError: With the name of each field that differs.
        """
        cached = dict(self.manifest.fingerprint[part])
        for field in [field for field, value in current.items() if value is None and cached[field] is not None]:
            print_log(f"The teacher cache's {part}.{field} were not compared: there is no file here.", 'current')
            cached.pop(field), current.pop(field)
        found = differences(cached, current, part)
        if found:
            raise CacheError(
                f'the teacher cache in {self.folder} is not of this run: {"; ".join(found)}. Make another '
                'cache (tools/cache_teacher.py CONFIG --views V --out DIR), or mend the config'
            )

    def _check_complete(self) -> None:
        missing = missing_shards(self.folder, self.manifest)
        if missing or self.manifest.top1 is None:
            raise CacheError(
                f'the teacher cache in {self.folder} is not finished, {len(missing)} of '
                f'{self.manifest.views * self.manifest.parts} shards are missing: {_AGAIN}, and it goes '
                'on'
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_view': -1, '_shards': {}}  # open files stay in their process


class _OpenShard:
    """A shard's file, open for reads of single records.

    They are no reads by memory map: for each page that is not in memory, a kernel reads what is around it in the file,
    128 KiB or more, which is wasted if images are shuffled. With plain reads it reads ahead only while they go through
    the file in order.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard) -> None:
        records = open_shard(folder, manifest, shard)
        self._file = os.open(folder / shard.name, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._size, self._start = records.itemsize, os.fstat(self._file).st_size - records.nbytes

    def read(self, row: int) -> bytes:
        return os.pread(self._file, self._size, self._start + row * self._size)


def missing_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    there = {entry.name for entry in os.scandir(folder)}
    return [shard for shard in manifest.shards if shard.name not in there]


def open_shard(folder: Path, manifest: Manifest, shard: Shard) -> np.ndarray:
    """A shard's records, as a memory map. Shape: (rows, ).

    Raises:
        CacheError: If the file is not what the manifest says.
        OSError: If it cannot be read.
    """
    path = folder / shard.name
    try:
        records = np.load(path, mmap_mode='r')
    except OSError:  # says itself what is wrong, and it need not be the file
        raise
    except Exception as error:  # whatever numpy makes of a damaged header
        raise _damaged(path, str(error)) from error
    expected = manifest.record.layout, len(manifest.images(shard.part))
    if (records.dtype, records.size) != expected:
        raise _damaged(path, f'{records.size} records of {records.dtype} instead of {expected[1]} of {expected[0]}')
    return np.asarray(records)


def write_shard(folder: Path, manifest: Manifest, shard: Shard, records: np.ndarray) -> None:
    """Put checksums into records, and write them."""
    images = manifest.images(shard.part)
    records['check'] = [
        _crc(record.tobytes(), manifest, shard.view, image) for record, image in zip(records, images, strict=True)
    ]
    with whole_file(folder / shard.name) as file:
        np.save(file, records)


def verify_shard(folder: Path, manifest: Manifest, shard: Shard) -> int:
    """How many of its records the teacher got right.

    Raises:
        CacheError: If a record is damaged.
    """
    records = open_shard(folder, manifest, shard)
    _check_records(folder, manifest, shard, records)
    return int((manifest.record.predictions(records) == records['label']).sum())


def strange_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    """The shards on disk whose first record is damaged or of another cache."""
    missing, strange = set(missing_shards(folder, manifest)), []
    for shard in manifest.shards:
        try:
            if shard not in missing:
                _check_records(folder, manifest, shard, open_shard(folder, manifest, shard)[:1])
        except CacheError:
            strange.append(shard)
    return strange


def _check_records(folder: Path, manifest: Manifest, shard: Shard, records: np.ndarray) -> None:
    for row, (record, image) in enumerate(zip(records, manifest.images(shard.part), strict=False)):
        if _crc(record.tobytes(), manifest, shard.view, image) != record['check']:
            raise _damaged(folder / shard.name, f'record {row}')


def _crc(record: bytes, manifest: Manifest, view: int, image: int) -> int:
    """Of a record without its last field, which holds it."""
    return zlib.crc32(record[:-4], zlib.crc32(struct.pack('<QQQ', manifest.seed, view, image), manifest.owner))


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(
        f'{path} is damaged or of another cache ({what}): delete it and {_AGAIN}, which makes that shard again'
    )


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(manifest)))


def _checksum(content: dict[str, Any]) -> str:
    """Of a manifest; that of format 1 did not cover the format."""
    return _digest({name: value for name, value in content.items() if (name, value) != ('format', 1)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
