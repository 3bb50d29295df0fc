"""Moved to :mod:`mmwsl.engine.cache_building`; this name ends with 0.3."""

import warnings

from mmwsl.engine.cache_building import *  # noqa: F403

warnings.warn(
    f'{__name__} has moved to mmwsl.engine.cache_building; the old name ends with 0.3', FutureWarning, stacklevel=2
)
