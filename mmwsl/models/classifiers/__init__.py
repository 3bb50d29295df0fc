"""Moved to :mod:`mmwsl.models.teachers`; this name ends with 0.3."""

import warnings

from mmwsl.models.teachers import *  # noqa: F403

warnings.warn(f'{__name__} has moved to mmwsl.models.teachers; the old name ends with 0.3', FutureWarning, stacklevel=2)
