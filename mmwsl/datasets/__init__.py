from mmwsl.datasets.digits import Digits
from mmwsl.datasets.resample import Resample
from mmwsl.datasets.views import SeededViews, ViewSampler

__all__ = ['Digits', 'Resample', 'SeededViews', 'ViewSampler']
