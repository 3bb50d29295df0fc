"""Parts from which the ``model`` of a config is built: algorithms, distillers, losses, teachers and backbones."""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.models import losses, weightings
from mmwsl.models.algorithms import WSLDistill
from mmwsl.models.backbones import CIFARVGG, CIFARMobileNetV2, CIFARResNet, CIFARShuffleNetV1, CIFARShuffleNetV2
from mmwsl.models.distillers import WSLDistiller
from mmwsl.models.losses import WeightedLoss, WSLLoss
from mmwsl.models.teachers import CachedTeacher, EnsembleTeacher

__all__ = [
    'CIFARVGG',
    'CIFARMobileNetV2',
    'CIFARResNet',
    'CIFARShuffleNetV1',
    'CIFARShuffleNetV2',
    'CachedTeacher',
    'EnsembleTeacher',
    'WSLDistill',
    'WSLDistiller',
    'WSLLoss',
    'WeightedLoss',
    'losses',
    'weightings',
]
