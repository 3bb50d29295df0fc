from mmwsl.datasets.device import DeviceDataset
from mmwsl.datasets.digits import Digits
from mmwsl.datasets.views import CachedViews, SeededViews, ViewSampler

__all__ = ['CachedViews', 'DeviceDataset', 'Digits', 'SeededViews', 'ViewSampler']
