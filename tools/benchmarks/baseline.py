"""Load the loss of another checkout of mmwsl into the process of this one."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mmengine.registry import Registry


@cache
def loss_of(checkout: Path) -> tuple[str, Callable]:
    """Return the version and the WSLLoss of a checkout.

    Args:
        checkout: Folder with the tree of a version, as ``git worktree add FOLDER COMMIT`` makes it.

    Raises:
        FileNotFoundError: If there is no mmwsl in the folder.
    """
    if not (checkout / 'mmwsl/models/losses').is_dir():
        raise FileNotFoundError(
            f'the baseline should be a folder with a tree of mmwsl, got {checkout}. '
            f'Make one with git worktree add {checkout} COMMIT'
        )
    with _mmwsl_of(checkout):
        version = importlib.import_module('mmwsl.version').__version__
        return version, importlib.import_module('mmwsl.models.losses').WSLLoss


@contextmanager
def _mmwsl_of(checkout: Path) -> Iterator[None]:
    """Import mmwsl's modules from a checkout in this context; what was imported before is restored afterwards.

    The packages above the losses are empty there: their own code registers all of mmwsl with mmengine, which has it.
    """
    ours = _take_out()
    for name in ('mmwsl', 'mmwsl.models'):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / name.replace('.', '/'))]
    sys.modules['mmwsl.registry'] = types.ModuleType('mmwsl.registry')
    sys.modules['mmwsl.registry'].MODELS = Registry('model', scope='baseline')  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _take_out()
        sys.modules.update(ours)


def _take_out() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition('.')[0] == 'mmwsl']
    return {name: sys.modules.pop(name) for name in names}
