from mmwsl.models.algorithms import WSLDistill
from mmwsl.models.backbones import CIFARVGG, CIFARMobileNetV2, CIFARResNet, CIFARShuffleNetV1, CIFARShuffleNetV2
from mmwsl.models.classifiers import CachedTeacher, EnsembleTeacher
from mmwsl.models.distillers import WSLDistiller
from mmwsl.models.losses import WSLLoss

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
    'WSLLoss'
]
