from mmwsl.models.teachers.cached_teacher import CachedTeacher
from mmwsl.models.teachers.ensemble_teacher import EnsembleTeacher

__all__ = ['CachedTeacher', 'EnsembleTeacher']
