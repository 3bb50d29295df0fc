from mmwsl.models.algorithms import WSLDistill
from mmwsl.models.backbones import CIFARResNet
from mmwsl.models.distillers import WSLDistiller
from mmwsl.models.losses import WSLLoss

__all__ = ['CIFARResNet', 'WSLDistill', 'WSLDistiller', 'WSLLoss']
