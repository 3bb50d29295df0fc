from mmwsl.datasets.digits import Digits
from mmwsl.datasets.views import CachedViews, SeededViews, ViewSampler

__all__ = ['CachedViews', 'Digits', 'SeededViews', 'ViewSampler']
