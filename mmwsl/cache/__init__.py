"""A teacher's answers on disk: taught once, read by every run over the same views.

``records`` says what is kept of one answer, ``store`` how records lie on disk and are read, ``fingerprint`` what they
belong to, ``build`` how they are made. ``teacher_losses`` is a file of its own: one number for each image.
"""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.cache.records import RecordFormat
from mmwsl.cache.store import CacheError, TeacherCache, TeacherRecord
from mmwsl.cache.teacher_losses import TeacherLosses

__all__ = ['CacheError', 'RecordFormat', 'TeacherCache', 'TeacherLosses', 'TeacherRecord']
