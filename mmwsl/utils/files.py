"""Files that are whole, and files that one process holds."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from filelock import lock_descriptor


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that is there whole or not at all, whatever happens in between; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    with open(partial, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)  # the name must last as the content does


def lock(stream: IO[Any], busy: str) -> None:
    """Lock an open file until this process and every process that inherited it have closed it.

    Use a file that holds nothing else: on Windows no other process can write its first byte meanwhile, and none
    inherits the lock.

    Raises:
        RuntimeError: If another process holds it; the message begins with ``busy``.
    """
    if not lock_descriptor(stream.fileno(), blocking=False):
        raise RuntimeError(f'{busy}: wait for it or end it, then give the same command again')


def _sync_folder(path: Path) -> None:
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
