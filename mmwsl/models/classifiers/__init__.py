from mmwsl.models.classifiers.cached_teacher import CachedTeacher
from mmwsl.models.classifiers.ensemble_teacher import EnsembleTeacher

__all__ = ['CachedTeacher', 'EnsembleTeacher']
