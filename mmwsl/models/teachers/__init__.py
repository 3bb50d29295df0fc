"""Frozen teachers: a single network, an ensemble, or answers replayed from a cache."""

from mmwsl.models.teachers.cached_teacher import CachedTeacher
from mmwsl.models.teachers.ensemble_teacher import EnsembleTeacher
from mmwsl.models.teachers.teacher import FrozenTeacher

__all__ = ['CachedTeacher', 'EnsembleTeacher', 'FrozenTeacher']
