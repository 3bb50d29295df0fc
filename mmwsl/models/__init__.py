from mmwsl.models.algorithms import WSLDistill
from mmwsl.models.backbones import CIFARVGG, CIFARMobileNetV2, CIFARResNet, CIFARShuffleNetV1, CIFARShuffleNetV2
from mmwsl.models.classifiers import EnsembleTeacher
from mmwsl.models.distillers import WSLDistiller
from mmwsl.models.losses import WSLLoss

__all__ = [
    'CIFARVGG',
    'CIFARMobileNetV2',
    'CIFARResNet',
    'CIFARShuffleNetV1',
    'CIFARShuffleNetV2',
    'EnsembleTeacher',
    'WSLDistill',
    'WSLDistiller',
    'WSLLoss'
]
