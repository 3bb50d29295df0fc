"""Losses with one value per target, and :class:`WeightedLoss`, which joins one with a weighting."""

from mmwsl.models.losses.base import SampleLoss
from mmwsl.models.losses.call import Call
from mmwsl.models.losses.logit_losses import DIST, DKD, NKD, TTM, BernoulliKD, SoftCrossEntropy, Standardized
from mmwsl.models.losses.weighted_loss import WeightedLoss, over_processes
from mmwsl.models.losses.wsl_loss import WSLLoss

__all__ = [
    'DIST',
    'DKD',
    'NKD',
    'TTM',
    'BernoulliKD',
    'Call',
    'SampleLoss',
    'SoftCrossEntropy',
    'Standardized',
    'WSLLoss',
    'WeightedLoss',
    'over_processes',
]
