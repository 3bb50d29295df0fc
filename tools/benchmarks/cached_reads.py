"""Measure reads per second from a teacher cache larger than memory, and images per second of a live ResNet-56.

A cache of random logits is written, then read in the order of the images and shuffled, as the store reads it and by
memory map. Before each turn its pages are dropped from memory. docs/teacher_cache.md shows how to limit the memory of
the process to less than the cache.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import caption, describe
from mmengine.registry import MODELS, init_default_scope

from mmwsl.cache import AnswerFormat, TeacherCache
from mmwsl.cache.store import Manifest, Shard, open_shard, write_shard
from mmwsl.models.teachers import FrozenTeacher

CLASSES, SHARD, BATCH = 1000, 8192, 64
ORDERS = ('in order', 'shuffled')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=650_000, help='4,014 bytes each')
    parser.add_argument('--seconds', type=float, default=5.0, help='of each contestant in a round')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--folder', type=Path, help='on the disk to be measured; a folder in it is made and deleted')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks'))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.images)
        found = measure(Path(folder), args.rounds, args.seconds)
    machine = describe('cpu')
    print(f'{args.images * AnswerFormat(CLASSES).layout.itemsize / 1e9:.2f} GB, {caption(machine)}')
    for name, (rate, size) in found.items():
        print(f'{name:24}{rate:10,.0f} a second, {size / 1e3:10,.1f} kB of disk each')
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'cached_reads.json').write_text(
        json.dumps({'machine': machine, 'images': args.images, 'a second, bytes of disk': found}, indent=1) + '\n'
    )


def write(folder: Path, images: int) -> None:
    """Write a cache of one view, all logits in float32, whose shards hold the same random records."""
    form, parts = AnswerFormat(CLASSES), -(-images // SHARD)
    manifest = Manifest(0, 1, images, parts, form, None, {}, {}, 0.5)
    logits = torch.randn(SHARD, CLASSES, generator=torch.Generator().manual_seed(0))
    records = form.encode(logits, torch.zeros(SHARD, dtype=torch.int64))
    for shard in manifest.shards:
        write_shard(folder, manifest, shard, records[: len(manifest.images(shard.part))].copy())
    manifest.save(folder)


def measure(folder: Path, rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Return the images per second of each contestant and the bytes it reads per image from disk, medians of rounds."""
    live = teaching()
    contestants: dict[str, tuple[int, Callable[[], Callable[[], object]]]] = {
        f'live, batches of {BATCH}': (BATCH, lambda: live)
    }
    for order in ORDERS:
        contestants[f'read {order}'] = 1, partial(reading, folder, order, stored)
        contestants[f'read {order}, by memory map'] = 1, partial(reading, folder, order, mapped)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (count, ready) in contestants.items():
            forget(folder)  # what is mapped cannot be dropped, so each turn opens the files again
            turns[name].append(turn(ready(), count, seconds))
    return {
        name: (median(rate for rate, _ in found), median(size for _, size in found)) for name, found in turns.items()
    }


def turn(work: Callable[[], object], count: int, seconds: float) -> tuple[float, float]:
    before, started, done = bytes_read(), time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        work()
        done += count
    return done / passed, (bytes_read() - before) / done


def reading(folder: Path, order: str, opened: Callable[[Path], Callable[[int, int], object]]) -> Callable[[], object]:
    """Return a function that reads the next image of an epoch at each call, over and over."""
    images = list(range(Manifest.load(folder).length))
    if order == 'shuffled':
        random.Random(0).shuffle(images)
    following, read = cycle(images), opened(folder)
    return lambda: read(0, next(following))


def stored(folder: Path) -> Callable[[int, int], object]:
    """Return a function that reads an answer as a run does."""
    return TeacherCache(folder).read


def mapped(folder: Path) -> Callable[[int, int], object]:
    """Return a function that reads an answer from a memory map of its shard, unchecked."""
    manifest = Manifest.load(folder)
    shards: dict[int, np.ndarray] = {}

    def read(view: int, image: int) -> bytes:
        row, part = divmod(image, manifest.parts)
        if part not in shards:
            shards[part] = open_shard(folder, manifest, Shard(view, part))
        return shards[part][row].tobytes()

    return read


def teaching() -> Callable[[], object]:
    """Return a function that runs ResNet-56 on a batch, as a live teacher does."""
    init_default_scope('mmpretrain')
    backbone = dict(type='mmwsl.CIFARResNet', depth=56)
    head = dict(type='LinearClsHead', num_classes=CLASSES, in_channels=64)
    teacher = FrozenTeacher(
        MODELS.build(dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head))
    )
    teacher.train()
    images = torch.zeros(BATCH, 3, 32, 32)
    for _ in range(2):  # the second makes its fast copy
        teacher(images)
    return lambda: teacher(images)


def forget(folder: Path) -> None:
    """Drop a folder's files from the memory of this machine."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def bytes_read() -> int:
    """Return the bytes that this process has read from disk."""
    lines = Path('/proc/self/io').read_text().splitlines()
    return int(next(line for line in lines if line.startswith('read_bytes:')).split()[1])


if __name__ == '__main__':
    main()
