"""File with a teacher's hard loss on each training image: one number for an image, whichever view a run draws."""

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
    """The teacher's cross-entropy on each training image at temperature 1, with the training set that it belongs to.

    An image is looked up by ``sample_idx``, its place in the innermost dataset (after ``indices``). Views, folds and
    resamples keep it, so one file serves them all.

    Args:
        losses: In nats, float32. Shape: (N, ).
        labels: Classes with which the losses were computed: those that training uses, wrong labels included. int64.
            Shape: (N, ).
        images: Fingerprint of the images (:func:`mmwsl.cache.fingerprint.training_set`).
        about: Origin of the losses, for the reader: ``kind`` ('teacher' or 'out of fold'), ``config``, ``weights``
            (SHA-256 of each network), and ``folds`` and ``seed`` if there are folds.

    Raises:
        ValueError: If there is not one finite, non-negative loss for each label.
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
                'losses should be float32 and labels int64, one of each for every image, got '
                + ' and '.join(f'{dtype} of shape {shape}' for dtype, shape in found)
            )
        wrong = np.flatnonzero(~(np.isfinite(self.losses) & (self.losses >= 0)))
        if len(wrong):
            raise ValueError(
                f'losses should be finite and not negative, got {self.losses[wrong[0]]} for image '
                f'{wrong[0]} ({len(wrong)} of {size} losses are wrong)'
            )

    def save(self, path: str | Path) -> None:
        """Write the losses as .npz, atomically."""
        header = json.dumps(dict(format=_FORMAT, checksum=self._checksum, images=self.images, about=self.about))
        with whole_file(Path(path)) as file:
            np.savez(file, header=np.frombuffer(header.encode(), np.uint8), losses=self.losses, labels=self.labels)

    @classmethod
    def load(cls, path: str | Path) -> TeacherLosses:
        """Read a file, without running code from it.

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
            raise CacheError(f'there is no file of teacher losses {path}: {_MAKE}') from error
        except OSError:  # its message says what is wrong, which may not be the file
            raise
        except Exception as error:  # whatever zip, numpy and json raise for a damaged file
            raise CacheError(
                f'{path} is damaged, or holds no teacher losses ({error!r}): restore it, or {_MAKE}'
            ) from error
        raise CacheError(f'{path} has format {header["format"]!r}, and this version of mmwsl reads {_FORMAT}: {_MAKE}')

    @classmethod
    def _checked(cls, header: dict[str, Any], losses: np.ndarray, labels: np.ndarray) -> TeacherLosses:
        found = cls(losses, labels, header['images'], header['about'])
        if found._checksum != header['checksum']:
            raise ValueError('its checksum does not match')
        return found

    def check(self, dataset: Any) -> None:
        """Compare images and labels with those of a training set; its pipeline may be different.

        Args:
            dataset: The training set, in wrappers or not.

        Raises:
            CacheError: If the number of images, their labels or the images differ; the message names all that do.
            ValueError: As :func:`mmwsl.cache.fingerprint.training_set`.
        """
        labels, images = training_set(dataset)
        found = (
            self._different_labels(labels)
            if len(labels) == len(self.labels)
            else [f'length is {len(self.labels)} in the file and {len(labels)} here']
        )
        if images != self.images:
            found.append('images are different')
        if found:
            raise CacheError(
                f'the teacher losses do not belong to this training set: {"; ".join(found)}. Correct the config, or '
                f'{_MAKE}'
            )

    def _different_labels(self, labels: np.ndarray) -> list[str]:
        differ = np.flatnonzero(labels != self.labels)
        return [
            f'labels of {len(differ)} of {len(labels)} images are different (image {image}: {self.labels[image]} in '
            f'the file and {labels[image]} here)'
            for image in differ[:1]
        ]

    @property
    def _checksum(self) -> str:
        digest = hashlib.sha256(json.dumps([self.images, self.about], sort_keys=True).encode())
        digest.update(self.losses.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()
