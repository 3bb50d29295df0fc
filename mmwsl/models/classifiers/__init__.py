from mmwsl.models.classifiers.ensemble_teacher import EnsembleTeacher

__all__ = ['EnsembleTeacher']
