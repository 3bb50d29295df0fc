"""Weightings: one weight per target, without gradient, by which a loss is multiplied."""

from mmwsl.models.weightings.base import SampleWeighting, build_weighting
from mmwsl.models.weightings.batch import BernoulliBatch, JointBernoulliBatch, SampleBatch
from mmwsl.models.weightings.controls import (
    MeanWeighting,
    RegularizationWeighting,
    ShuffledWeighting,
    UniformWeighting,
)
from mmwsl.models.weightings.softness import (
    DisagreementWeighting,
    EntropyWeighting,
    ProductWeighting,
    WTTMWeighting,
)
from mmwsl.models.weightings.wsl import LabelFreeWSLWeighting, WSLWeighting

__all__ = [
    'BernoulliBatch',
    'DisagreementWeighting',
    'EntropyWeighting',
    'JointBernoulliBatch',
    'LabelFreeWSLWeighting',
    'MeanWeighting',
    'ProductWeighting',
    'RegularizationWeighting',
    'SampleBatch',
    'SampleWeighting',
    'ShuffledWeighting',
    'UniformWeighting',
    'WSLWeighting',
    'WTTMWeighting',
    'build_weighting',
]
