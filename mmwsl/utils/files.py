from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


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
    folder = os.open(path.parent, os.O_RDONLY)  # the name must last as the content does
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lock(stream: IO[Any], busy: str) -> None:
    """Lock an open file until it is closed.

    Raises:
        RuntimeError: If another process holds it; the message begins with ``busy``.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f'{busy}: wait for it or end it, then give the same command again') from error
