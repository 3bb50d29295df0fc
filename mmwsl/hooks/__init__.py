"""Moved to :mod:`mmwsl.engine.hooks`; this name ends with 0.3."""

import warnings

from mmwsl.engine.hooks import *  # noqa: F403

warnings.warn(f'{__name__} has moved to mmwsl.engine.hooks; the old name ends with 0.3', FutureWarning, stacklevel=2)
