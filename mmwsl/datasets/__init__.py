from mmwsl.datasets.digits import Digits
from mmwsl.datasets.views import SeededViews, ViewSampler

__all__ = ['Digits', 'SeededViews', 'ViewSampler']
