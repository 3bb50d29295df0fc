"""A teacher's answers on disk: taught once, read by every run over the same views.

``records`` says what is kept of one answer, ``store`` how records lie on disk and are read, ``fingerprint`` what they
belong to, ``build`` how they are made.
"""
import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.cache.records import RecordFormat
from mmwsl.cache.store import CacheError, TeacherCache, TeacherRecord

__all__ = ['CacheError', 'RecordFormat', 'TeacherCache', 'TeacherRecord']
