"""Moved to :mod:`mmwsl.functional`; this name ends with 0.3."""

import warnings

from mmwsl.functional import *  # noqa: F403

warnings.warn(f'{__name__} has moved to mmwsl.functional; the old name ends with 0.3', FutureWarning, stacklevel=2)
