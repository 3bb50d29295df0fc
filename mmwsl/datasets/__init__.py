"""Replayable views, images on the device, folds and resamples, and datasets that need no download."""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.datasets.bootstrap_dataset import BootstrapDataset
from mmwsl.datasets.device import DeviceDataset
from mmwsl.datasets.digit_scenes import DigitScenes
from mmwsl.datasets.digits import Digits
from mmwsl.datasets.fold import Fold
from mmwsl.datasets.label_noise import LabelNoise
from mmwsl.datasets.views import CachedViews, InfiniteViewSampler, SeededViews, ViewSampler
from mmwsl.utils.old_names import renamed

__all__ = [
    'BootstrapDataset',
    'CachedViews',
    'DeviceDataset',
    'DigitScenes',
    'Digits',
    'Fold',
    'InfiniteViewSampler',
    'LabelNoise',
    'SeededViews',
    'ViewSampler',
]

__getattr__ = renamed(__name__, Resample='BootstrapDataset')
