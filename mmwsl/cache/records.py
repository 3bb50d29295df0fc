"""Moved to :mod:`mmwsl.cache.answers`; this name ends with 0.3."""

import warnings

from mmwsl.cache.answers import *  # noqa: F403
from mmwsl.cache.answers import AnswerFormat as RecordFormat  # noqa: F401

warnings.warn(f'{__name__} has moved to mmwsl.cache.answers; the old name ends with 0.3', FutureWarning, stacklevel=2)
