"""A teacher's answers on disk: computed once, and read by every run over the same views.

``answers`` encodes the logits of one view, ``store`` writes and reads the files, and ``fingerprint`` identifies the
teacher and the data that they belong to. :mod:`mmwsl.engine.cache_building` fills a cache. ``teacher_losses`` is
independent of it: a single file with one number for each image.
"""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.cache.answers import AnswerFormat
from mmwsl.cache.store import CachedAnswer, CacheError, TeacherCache
from mmwsl.cache.teacher_losses import TeacherLosses
from mmwsl.utils.old_names import renamed

__all__ = ['AnswerFormat', 'CacheError', 'CachedAnswer', 'TeacherCache', 'TeacherLosses']

__getattr__ = renamed(__name__, RecordFormat='AnswerFormat', TeacherRecord='CachedAnswer')
