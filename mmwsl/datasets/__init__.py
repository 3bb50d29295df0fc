"""Views that can be replayed, images on the device, folds and resamples, and data that need no download."""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.datasets.device import DeviceDataset
from mmwsl.datasets.digit_scenes import DigitScenes
from mmwsl.datasets.digits import Digits
from mmwsl.datasets.fold import Fold
from mmwsl.datasets.label_noise import LabelNoise
from mmwsl.datasets.resample import Resample
from mmwsl.datasets.views import CachedViews, InfiniteViewSampler, SeededViews, ViewSampler

__all__ = [
    'CachedViews',
    'DeviceDataset',
    'DigitScenes',
    'Digits',
    'Fold',
    'InfiniteViewSampler',
    'LabelNoise',
    'Resample',
    'SeededViews',
    'ViewSampler',
]
