"""Store a teacher's answers on disk, and read them.

A cache is a folder with ``cache.json``, which describes it, and one ``.npy`` file of answers for each *shard*: a part
of the images in one view. Image i is stored in part ``i % parts`` at row ``i // parts``, so that each part is a fair
sample even if the images are sorted by class. Files are written atomically. Each answer has a checksum, which also
covers its cache, seed, view and image, and is verified at each read, so nothing has to be scanned at the start.
Checksums of format 1 did not cover the cache: such a cache is read, but not extended.
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

from mmwsl.cache.answers import AnswerFormat
from mmwsl.cache.fingerprint import differences, versions
from mmwsl.utils.files import whole_file

MANIFEST = 'cache.json'
FORMAT = 2
_READ = (1, FORMAT)
_FORMAT_KEY = 'record'  # of ``answer_format`` in cache.json, as since 0.1.0
_OPEN = 512  # files at once in a process, which may have 1,024 on most machines
_AGAIN = 'run tools/cache_teacher.py again'


class CacheError(RuntimeError):
    """A teacher cache cannot be used; the message says why, and what to do."""


class Shard(NamedTuple):
    """A file of answers: those for one part of the images, in one view."""

    view: int
    part: int

    @property
    def name(self) -> str:
        return f'{self.view:04}-{self.part:05}.npy'


class CachedAnswer(NamedTuple):
    """A stored answer, which a sample carries from the dataset to the model."""

    data: bytes
    cache: str
    """``Manifest.identity`` of the cache it was read from."""


@dataclass
class Manifest:
    """Description of a cache, stored as ``cache.json``."""

    seed: int
    """A view is drawn from (seed, view, image)."""
    views: int
    length: int
    """Number of images."""
    parts: int
    answer_format: AnswerFormat
    batch_size: int | None
    """The teacher's batch size, if it predicts with batch statistics."""
    fingerprint: dict[str, dict]
    """Fingerprints of ``teacher`` and ``data``."""
    versions: dict[str, str]
    top1: float | None = None
    """Top-1 accuracy of the teacher on all stored views, in [0, 1]; None until the cache is finished."""
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """Digest that is equal for caches with the same answers, however many views they have."""
        return _digest(self.settings)[:16]

    @property
    def settings(self) -> dict[str, Any]:
        """Fields that may not change from one run of the builder to the next."""
        free = ('views', 'versions', 'top1', 'format')
        return {name: value for name, value in _to_json(self).items() if name not in free}

    @functools.cached_property
    def owner(self) -> int:
        """Number that identifies this cache; the checksum of each answer starts from it."""
        return zlib.crc32(self.identity.encode()) if self.format > 1 else 0

    @property
    def shards(self) -> Iterator[Shard]:
        return (Shard(view, part) for view in range(self.views) for part in range(self.parts))

    def images(self, part: int) -> np.ndarray:
        """Return the indices of a part's images, by row."""
        return np.arange(part, self.length, self.parts)

    def save(self, folder: Path) -> None:
        content = _to_json(self)
        text = json.dumps({'checksum': _checksum(content), **content}, indent=1, sort_keys=True)
        with whole_file(folder / MANIFEST) as file:
            file.write(text.encode())

    def warn_of_other_versions(self) -> None:
        """Log a warning if the cache has an older format or was made by other versions of the libraries."""
        if self.format < FORMAT:
            print_log(
                f'The teacher cache has format {self.format}, whose shards do not tell which cache they belong to: '
                "a file copied from another teacher's cache would go unnoticed. It is read, but not extended.",
                'current',
                logging.WARNING,
            )
        found = differences(self.versions, versions())
        if found:
            print_log(
                f'The teacher cache was made with other versions: {"; ".join(found)}. Views may now be drawn '
                'differently.',
                'current',
                logging.WARNING,
            )

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``cache.json``.

        Raises:
            CacheError: If it is missing, damaged or of another format.
        """
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
            raise CacheError(f'{path} is damaged ({error!r}): restore it, or make the cache again') from error
        if found not in _READ:
            raise CacheError(
                f'{path} has format {found!r}, and this version of mmwsl reads {_READ}: make the cache again'
            )
        if checksum != _checksum(content):
            raise CacheError(f'{path} is damaged (its checksum does not match): restore it, or make the cache again')
        form = content.pop(_FORMAT_KEY)
        return cls(answer_format=AnswerFormat(**{**form, 'taus': tuple(form['taus'])}), **content)


class TeacherCache:
    """Reader of a finished cache.

    Args:
        folder: Folder that ``tools/cache_teacher.py`` filled.

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

    def read(self, view: int, image: int) -> CachedAnswer:
        """Return the teacher's answer to a view of an image.

        Raises:
            CacheError: If it is damaged, or belongs to another view, image or cache.
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
            raise _damaged(self.folder / Shard(view, part).name, f'answer {row}')
        return CachedAnswer(data, self.identity)

    def check(self, part: str, current: dict[str, Any]) -> None:
        """Compare one part of the fingerprint, 'teacher' or 'data', with that of a run.

        Raises:
            CacheError: If they differ; the message names each field that does.
        """
        cached = dict(self.manifest.fingerprint[part])
        for field in [field for field, value in current.items() if value is None and cached[field] is not None]:
            print_log(f"The teacher cache's {part}.{field} were not compared: there is no file to read.", 'current')
            cached.pop(field), current.pop(field)
        found = differences(cached, current, part)
        if found:
            raise CacheError(
                f'the teacher cache in {self.folder} does not belong to this run: {"; ".join(found)}. Make another '
                'cache (tools/cache_teacher.py CONFIG --views V --out DIR), or correct the config'
            )

    def _check_complete(self) -> None:
        missing = missing_shards(self.folder, self.manifest)
        if missing or self.manifest.top1 is None:
            raise CacheError(
                f'the teacher cache in {self.folder} is not finished, {len(missing)} of '
                f'{self.manifest.views * self.manifest.parts} shards are missing: {_AGAIN} to resume'
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_view': -1, '_shards': {}}  # open files stay in their process


class _OpenShard:
    """A shard's file, open for reads of single records.

    It is not memory-mapped: for each page that is not in memory, the kernel would read the 128 KiB or more around it,
    which is wasted if images are shuffled. With plain reads the kernel reads ahead only while they follow the file's
    order.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard) -> None:
        records = open_shard(folder, manifest, shard)
        self._file = os.open(folder / shard.name, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._size, self._start = records.itemsize, os.fstat(self._file).st_size - records.nbytes

    def read(self, row: int) -> bytes:
        return os.pread(self._file, self._size, self._start + row * self._size)


def missing_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    """Return the shards that have no file yet."""
    present = {entry.name for entry in os.scandir(folder)}
    return [shard for shard in manifest.shards if shard.name not in present]


def open_shard(folder: Path, manifest: Manifest, shard: Shard) -> np.ndarray:
    """Return a shard's answers as a memory map. Shape: (rows, ).

    Raises:
        CacheError: If the file is not as the manifest describes it.
        OSError: If it cannot be read.
    """
    path = folder / shard.name
    try:
        answers = np.load(path, mmap_mode='r')
    except OSError:  # its message says what is wrong, which may not be the file
        raise
    except Exception as error:  # whatever numpy raises for a damaged header
        raise _damaged(path, str(error)) from error
    expected = manifest.answer_format.layout, len(manifest.images(shard.part))
    if (answers.dtype, answers.size) != expected:
        raise _damaged(path, f'{answers.size} answers of {answers.dtype} instead of {expected[1]} of {expected[0]}')
    return np.asarray(answers)


def write_shard(folder: Path, manifest: Manifest, shard: Shard, answers: np.ndarray) -> None:
    """Fill in the checksums of answers, and write the file."""
    images = manifest.images(shard.part)
    answers['check'] = [
        _crc(answer.tobytes(), manifest, shard.view, image) for answer, image in zip(answers, images, strict=True)
    ]
    with whole_file(folder / shard.name) as file:
        np.save(file, answers)


def verify_shard(folder: Path, manifest: Manifest, shard: Shard) -> int:
    """Check every answer of a shard, and return how many of them are right.

    Raises:
        CacheError: If an answer is damaged.
    """
    answers = open_shard(folder, manifest, shard)
    _check_answers(folder, manifest, shard, answers)
    return int((manifest.answer_format.predictions(answers) == answers['label']).sum())


def strange_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    """Return the shards on disk whose first answer is damaged or belongs to another cache."""
    missing, strange = set(missing_shards(folder, manifest)), []
    for shard in manifest.shards:
        try:
            if shard not in missing:
                _check_answers(folder, manifest, shard, open_shard(folder, manifest, shard)[:1])
        except CacheError:
            strange.append(shard)
    return strange


def _check_answers(folder: Path, manifest: Manifest, shard: Shard, answers: np.ndarray) -> None:
    for row, (answer, image) in enumerate(zip(answers, manifest.images(shard.part), strict=False)):
        if _crc(answer.tobytes(), manifest, shard.view, image) != answer['check']:
            raise _damaged(folder / shard.name, f'answer {row}')


def _crc(answer: bytes, manifest: Manifest, view: int, image: int) -> int:
    """Checksum of an answer without its last field, where the checksum is stored."""
    return zlib.crc32(answer[:-4], zlib.crc32(struct.pack('<QQQ', manifest.seed, view, image), manifest.owner))


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(
        f'{path} is damaged or of another cache ({what}): delete it and {_AGAIN}, which makes that shard again'
    )


def _to_json(manifest: Manifest) -> dict[str, Any]:
    content = json.loads(json.dumps(asdict(manifest)))
    content[_FORMAT_KEY] = content.pop('answer_format')
    return content


def _checksum(content: dict[str, Any]) -> str:
    """Digest of a manifest's content; in format 1 it did not cover the format."""
    return _digest({name: value for name, value in content.items() if (name, value) != ('format', 1)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
