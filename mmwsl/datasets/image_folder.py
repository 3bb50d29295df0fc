"""Inspect a folder of images: its classes, its unusable files, and its split into training and validation images."""

from __future__ import annotations

import difflib
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mmwsl.utils.text import first_of

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
"""Suffixes of the files that mmpretrain's CustomDataset reads."""
_TRAIN, _VAL = ('train', 'training'), ('val', 'valid', 'validation', 'test')
_GREY = ('1', 'L', 'LA', 'I', 'I;16', 'F')
_HIDDEN = ('.', '__MACOSX')
_MEASURED = 2000  # largest number of images from which mean and standard deviation are computed


@dataclass(frozen=True)
class ImageFile:
    """An image that can be opened, with its path below the folder and its class."""

    path: str
    label: int
    size: tuple[int, int]
    """Width and height."""
    grey: bool
    digest: bytes
    """Hash of the file's content."""


@dataclass
class ImageFolder:
    """The contents of a folder, as found by :func:`inspect_folder`."""

    root: Path
    classes: list[str]
    train: list[ImageFile]
    val: list[ImageFile]
    prefixes: tuple[str, str] | None
    """Folders of training and validation images; None if there was one folder per class and the images were split."""
    broken: list[str] = field(default_factory=list)
    """Files that are empty or cannot be opened, and are left out."""
    others: list[str] = field(default_factory=list)
    """Files without the suffix of an image."""
    hidden: list[str] = field(default_factory=list)

    @property
    def needs_lists(self) -> bool:
        """Whether lists of the images are needed, because a dataset that reads whole folders would read other files."""
        return self.prefixes is None or bool(self.broken) or any('/' in name for name in self.hidden)

    def without(self, images: Sequence[ImageFile]) -> list[str]:
        """Return the classes without any of these images."""
        present = {image.label for image in images}
        return [name for label, name in enumerate(self.classes) if label not in present]

    def in_both(self) -> list[str]:
        """Return the validation images whose files are also those of training images, byte for byte."""
        trained = {image.digest for image in self.train}
        return [image.path for image in self.val if image.digest in trained]

    @property
    def edge(self) -> int:
        """Median of the training images' shorter edges, in pixels."""
        return int(np.median([min(image.size) for image in self.train]))

    @property
    def sizes(self) -> set[tuple[int, int]]:
        return {image.size for image in (*self.train, *self.val)}

    def describe(self) -> str:
        """Describe the folder's contents to a user, in a few lines."""
        per_class = Counter(image.label for image in self.train)
        least, most = min(per_class.values()), max(per_class.values())
        images = (*self.train, *self.val)
        grey = sum(image.grey for image in images)
        colour = 'colour' if not grey else 'grey' if grey == len(images) else f'{grey} grey, the others in colour'
        widths, heights = zip(*self.sizes, strict=True)
        size = (
            f'{widths[0]} x {heights[0]} pixels'
            if len(self.sizes) == 1
            else f'{min(widths)} x {min(heights)} to {max(widths)} x {max(heights)} pixels'
        )
        source = (
            f'from {self.prefixes[0]}/ and {self.prefixes[1]}/'
            if self.prefixes
            else 'split by the names of the files, the same way every time'
        )
        lines = [
            f'{self.root}: {len(self.classes)} classes ({first_of(self.classes)})',
            f'  {len(self.train)} training and {len(self.val)} validation images, {source}',
            f'  {least} to {most} training images a class' if least < most else f'  {least} training images a class',
            f'  {size}, {colour}',
        ]
        left_out = (
            ('hidden folders', self.hidden),
            ('empty or broken files', self.broken),
            (f'files that do not end in {", ".join(IMAGES)}', self.others),
        )
        if unseen := self.without(self.val):
            lines.append(f'  no validation images of {first_of(unseen)}')
        if same := self.in_both():
            lines.append(
                f'  {len(same)} validation images are training images, too, so figures will be too good: '
                f'{first_of(same)}'
            )
        lines += [f'  left out: {len(names)} {what}: {first_of(names)}' for what, names in left_out if names]
        return '\n'.join(lines)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of the training images' channels, RGB from 0 to 255.

        At most 2,000 images are read.
        """
        step = -(-len(self.train) // _MEASURED)
        total, squares, count = np.zeros(3), np.zeros(3), 0
        for image in self.train[::step]:
            with Image.open(self.root / image.path) as opened:
                pixels = np.asarray(opened.convert('RGB'), np.float64).reshape(-1, 3)
            total, squares, count = total + pixels.sum(0), squares + (pixels**2).sum(0), count + len(pixels)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))  # not 0 for images of a single shade
        return np.round(mean, 2).tolist(), np.round(std, 2).tolist()


def inspect_folder(root: Path, val_share: float = 0.2, tell: Callable[[str], None] = lambda line: None) -> ImageFolder:
    """Open every image of a folder, and split the images unless they are split already.

    Args:
        root: Folder with ``train/<class>/<image>`` and ``val/<class>/<image>`` (or valid, validation, test), or with
            ``<class>/<image>``.
        val_share: Share of each class's images to use for validation, if they are not split. It is decided by hashes of
            their paths, so the same folder is always split in the same way.
        tell: Called with messages on the progress.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than two classes, training and validation images have different classes, or a
            class has no training image.
    """
    if not root.is_dir():
        parent = next(folder for folder in root.absolute().parents if folder.is_dir())
        names = _folders(parent)[0]
        close = difflib.get_close_matches(root.name, names, n=1)
        raise FileNotFoundError(
            f'there is no folder {root}; in {parent} there is {close[0] if close else first_of(names) or "none"}. '
            'Give --data the folder with train/ and val/, or with one folder per class'
        )
    folders, hidden = _folders(root)
    prefixes = _split_of(root, folders)
    found = ImageFolder(root, [], [], [], prefixes, hidden=hidden)
    if prefixes:
        found.classes = _common_classes(found, prefixes)
        found.train, found.val = (_images_in(found, prefix, tell) for prefix in prefixes)
    else:
        found.classes = folders
        images = _images_in(found, '', tell) if folders else []
        _split(found, images, val_share)
    _check(found)
    return found


def _folders(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the visible and of the hidden folders in a folder."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    hidden = [name for name in names if name.startswith(_HIDDEN)]
    return [name for name in names if name not in hidden], hidden


def _split_of(root: Path, folders: Sequence[str]) -> tuple[str, str] | None:
    train, val = (
        sorted((name for name in folders if name.lower() in known), key=lambda name: known.index(name.lower()))
        for known in (_TRAIN, _VAL)
    )
    if train and not val:
        raise ValueError(
            f'{root} has {train[0]}/ and no folder of validation images ({", ".join(_VAL)}), only {first_of(folders)}. '
            f'Rename it to val, or give --data {root / train[0]}, which is then split'
        )
    return (train[0], val[0]) if train and val else None


def _common_classes(found: ImageFolder, prefixes: tuple[str, str]) -> list[str]:
    named = []
    for prefix in prefixes:
        visible, hidden = _folders(found.root / prefix)
        found.hidden += [f'{prefix}/{name}' for name in hidden]
        named.append(visible)
    if named[0] != named[1]:
        only = [sorted(set(one) - set(other)) for one, other in (named, named[::-1])]
        raise ValueError(
            f'{prefixes[0]}/ and {prefixes[1]}/ in {found.root} should have the same classes; only in '
            f'{prefixes[0]}/: {first_of(only[0]) or "none"}; only in {prefixes[1]}/: '
            f'{first_of(only[1]) or "none"}. Give both the same class folders: rename or delete these'
        )
    return named[0]


def _images_in(found: ImageFolder, prefix: str, tell: Callable[[str], None]) -> list[ImageFile]:
    """Open all files of the classes; those that cannot be opened are added to ``found``."""
    files = [(path, label) for label, name in enumerate(found.classes) for path in _files(found.root / prefix / name)]
    images = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, ((path, label), seen) in enumerate(
            zip(files, pool.map(_look, (file for file, _ in files)), strict=True), 1
        ):
            name = path.relative_to(found.root).as_posix()
            if number % 5000 == 0:
                tell(f'opened {number} of {len(files)} files in {found.root / prefix}')
            if path.suffix.lower() not in IMAGES:
                found.others.append(name)
            elif seen is None:
                found.broken.append(name)
            else:
                images.append(ImageFile(name, label, *seen))
    return images


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield from (Path(parent) / name for name in sorted(files) if not name.startswith('.'))


def _look(path: Path) -> tuple[tuple[int, int], bool, bytes] | None:
    """Return the size of an image, whether it is grey, and a hash of its file; None if it cannot be decoded."""
    if path.suffix.lower() not in IMAGES:
        return None
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter('ignore')
            image.load()
            return image.size, image.mode in _GREY, hashlib.sha256(path.read_bytes()).digest()
    except Exception:  # whatever a decoder raises for a broken file
        return None


def _split(found: ImageFolder, images: list[ImageFile], share: float) -> None:
    """Split each class by the hashes of its images' paths, with at least one image on either side."""
    for label in range(len(found.classes)):
        of_class = sorted((image for image in images if image.label == label), key=lambda image: _hash(image.path))
        held_out = max(1, round(share * len(of_class))) if len(of_class) > 1 else 0
        found.val += of_class[:held_out]
        found.train += of_class[held_out:]


def _hash(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def _check(found: ImageFolder) -> None:
    if len(found.classes) < 2:
        there = f'{len(found.classes)} ({first_of(found.classes)})' if found.classes else 'none'
        inner = [] if found.prefixes else [found.root / name for name in found.classes]
        deeper = [folder for folder in inner if len(_folders(folder)[0]) > 1]
        raise ValueError(
            f'{found.root} should hold two classes or more, a folder each (or train/ and val/ with them), '
            f'got {there}. Give --data {deeper[0] if deeper else "the folder above the classes"}'
        )
    without = found.without(found.train)
    if without:
        where = f'{found.root / found.prefixes[0]}' if found.prefixes else f'{found.root}'
        left_out = found.broken + found.others
        raise ValueError(
            f'no training image ({", ".join(IMAGES)}) in {where} can be opened for the class '
            f'{first_of(without)}{f"; left out were {first_of(left_out)}" if left_out else ""}. '
            'Add images, or delete the folders of these classes'
        )
    if not found.val:
        raise ValueError(
            f'no validation image that opens ({", ".join(IMAGES)}) in {found.root / found.prefixes[1]}. Add images, or '
            f'give --data {found.root / found.prefixes[0]}, which is then split'
            if found.prefixes
            else f'each class in {found.root} has one image, and needs one more for validation. Add images'
        )
