"""A teacher's hard loss of each training image in a file: one number an image, whatever view of it a run draws."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmwsl.cache.fingerprint import training_set
from mmwsl.cache.store import CacheError
from mmwsl.utils.files import whole_file

_FORMAT = 1
_MAKE = 'make one with tools/teacher_losses.py CONFIG CHECKPOINT --out FILE'


@dataclass(frozen=True, eq=False)
class TeacherLosses:
    """The teacher's cross-entropy of each training image at temperature 1, and what it belongs to.

    An image is found by ``sample_idx``, its place in the innermost dataset (after ``indices``). Views, folds and
    resamples keep it, so one file serves them all.

    Args:
        losses: In nats, float32. Shape: (N, ).
        labels: The classes that they are losses of: those that training uses, wrong ones included. int64. Shape: (N, ).
        images: Fingerprint of the images (:func:`mmwsl.cache.fingerprint.training_set`).
        about: Where they come from, for the reader: ``kind`` ('teacher' or 'out of fold'), ``config``, ``weights``
            (SHA-256 of each network), and ``folds`` and ``seed`` if there are folds.

    Raises:
        ValueError: If losses are not one finite, non-negative number for each label.
    """

    losses: np.ndarray
    labels: np.ndarray
    images: str
    about: dict[str, str]

    def __post_init__(self) -> None:
        found = [(array.dtype, array.shape) for array in (self.losses, self.labels)]
        size = len(self.losses) if self.losses.ndim else 0
        if found != [(np.float32, (size,)), (np.int64, (size,))]:
            raise ValueError(
                'losses and labels should be one float32 and one int64 for each image, got '
                + ' and '.join(f'{dtype} of shape {shape}' for dtype, shape in found)
            )
        wrong = np.flatnonzero(~(np.isfinite(self.losses) & (self.losses >= 0)))
        if len(wrong):
            raise ValueError(
                f'losses should be finite and not negative, got {self.losses[wrong[0]]} for image '
                f'{wrong[0]} ({len(wrong)} of {size} are such)'
            )

    def save(self, path: str | Path) -> None:
        """Write them as .npz; the file is there whole or not at all."""
        header = json.dumps(dict(format=_FORMAT, checksum=self._checksum, images=self.images, about=self.about))
        with whole_file(Path(path)) as file:
            np.savez(file, header=np.frombuffer(header.encode(), np.uint8), losses=self.losses, labels=self.labels)

    @classmethod
    def load(cls, path: str | Path) -> TeacherLosses:
        """Read a file; no code in it is run.

        Raises:
            CacheError: If the file is missing, damaged or of another format, or a loss is negative or not finite.
            OSError: If it cannot be read.
        """
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as arrays:
                header = json.loads(arrays['header'].tobytes())
                if header['format'] == _FORMAT:
                    return cls._checked(header, arrays['losses'], arrays['labels'])
        except FileNotFoundError as error:
            raise CacheError(f'there are no teacher losses in {path}: {_MAKE}') from error
        except OSError:  # says itself what is wrong, and it need not be the file
            raise
        except Exception as error:  # whatever zip, numpy and json make of a damaged file
            raise CacheError(
                f'{path} is damaged, or holds no teacher losses ({error!r}): restore it, or {_MAKE}'
            ) from error
        raise CacheError(
            f'{path} is of format {header["format"]!r}, and this version of mmwsl reads {_FORMAT}: {_MAKE}'
        )

    @classmethod
    def _checked(cls, header: dict[str, Any], losses: np.ndarray, labels: np.ndarray) -> TeacherLosses:
        found = cls(losses, labels, header['images'], header['about'])
        if found._checksum != header['checksum']:
            raise ValueError('its checksum does not fit')
        return found

    def check(self, dataset: Any) -> None:
        """Compare images and labels with those of a training set. Its pipeline may be another.

        Args:
            dataset: The training set, in wrappers or not.

        Raises:
            CacheError: If the number of images, their labels or the images differ; all that do are named.
            ValueError: As of :func:`mmwsl.cache.fingerprint.training_set`.
        """
        labels, images = training_set(dataset)
        found = (
            self._different_labels(labels)
            if len(labels) == len(self.labels)
            else [f'length is {len(self.labels)} in the file and {len(labels)} here']
        )
        if images != self.images:
            found.append('images are others')
        if found:
            raise CacheError(
                f'the teacher losses are not of this training set: {"; ".join(found)}. Mend the config, or {_MAKE}'
            )

    def _different_labels(self, labels: np.ndarray) -> list[str]:
        differ = np.flatnonzero(labels != self.labels)
        return [
            f'labels of {len(differ)} of {len(labels)} images are others (image {image}: {self.labels[image]} in '
            f'the file and {labels[image]} here)'
            for image in differ[:1]
        ]

    @property
    def _checksum(self) -> str:
        digest = hashlib.sha256(json.dumps([self.images, self.about], sort_keys=True).encode())
        digest.update(self.losses.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()
