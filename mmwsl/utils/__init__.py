"""Checkpoints, labels and files."""

import importlib
import warnings
from typing import Any

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.utils.checkpoint import load_network, load_weights, read_weights, save_weights, student_weights
from mmwsl.utils.data import set_dataloader_defaults, single_labels
from mmwsl.utils.files import whole_file

__all__ = [
    'load_network',
    'load_weights',
    'read_weights',
    'save_weights',
    'set_dataloader_defaults',
    'single_labels',
    'student_weights',
    'whole_file',
]
_IN_ENGINE = ('check_data', 'finish_run', 'launch', 'launcher_parser', 'prepare_run', 'runs')


def __getattr__(name: str) -> Any:
    """Moved to :mod:`mmwsl.engine`; the old names warn, and end with 0.3."""
    if name not in _IN_ENGINE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    warnings.warn(
        f'mmwsl.utils.{name} has moved to mmwsl.engine.{name}; the old name ends with 0.3', FutureWarning, stacklevel=2
    )
    return getattr(importlib.import_module('mmwsl.engine'), name)
