from mmwsl.datasets.device import DeviceDataset
from mmwsl.datasets.digits import Digits
from mmwsl.datasets.views import SeededViews, ViewSampler

__all__ = ['DeviceDataset', 'Digits', 'SeededViews', 'ViewSampler']
