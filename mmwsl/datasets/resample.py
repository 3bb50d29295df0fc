"""Moved to :mod:`mmwsl.datasets.bootstrap_dataset`; this name ends with 0.3."""

import warnings

from mmwsl.datasets.bootstrap_dataset import *  # noqa: F403
from mmwsl.datasets.bootstrap_dataset import BootstrapDataset as Resample  # noqa: F401

warnings.warn(
    f'{__name__} has moved to mmwsl.datasets.bootstrap_dataset; the old name ends with 0.3', FutureWarning, stacklevel=2
)
