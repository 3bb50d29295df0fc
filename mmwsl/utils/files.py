"""Write files completely or not at all, and lock files."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from filelock import lock_descriptor

REMAINS = '*.partial'
"""Names of unfinished files that killed processes leave; nothing reads them."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that appears whole or not at all, even after a kill; make its folder.

    Several writers of one file do not disturb each other: the last to finish wins. A file that is replaced keeps its
    mode; a new one has that of the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name[:40]}.{secrets.token_hex(8)}{REMAINS[1:]}')
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    # exclusive: a file or link that someone else put there is neither overwritten nor followed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0)
    descriptor = os.open(partial, flags, 0o666 if mode is None else mode)
    try:
        with open(descriptor, 'wb') as file:
            if mode is not None:
                os.chmod(partial, mode)  # without the umask
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)  # makes the name as durable as the content


def lock(stream: IO[Any], busy: str) -> None:
    """Lock an open file until this process and every process that inherited it have closed it.

    Use a file that holds nothing else: on Windows no other process can write its first byte meanwhile, and none
    inherits the lock.

    Raises:
        RuntimeError: If another process holds it; the message begins with ``busy``.
        OSError: If the storage does not support locks.
    """
    if not lock_descriptor(stream.fileno(), blocking=False):
        raise RuntimeError(f'{busy}: wait for it or end it, then give the same command again')


def shown(path: str | Path) -> str:
    """Return a path as a user in this folder would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith('..') else relative


def _sync_folder(path: Path) -> None:
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a storage that cannot sync folders
            raise
    finally:
        os.close(folder)
