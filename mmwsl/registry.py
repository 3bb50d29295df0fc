"""Registries of mmwsl: direct children of mmengine's root registries, so that ``type='mmwsl.X'`` resolves in any scope.

Children of mmrazor's or mmpretrain's registries would not be found from the root.
"""

import mmwsl.compat  # noqa: F401, I001  prepares the stack, so it comes first

from mmengine.registry import DATA_SAMPLERS as ROOT_DATA_SAMPLERS
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import FUNCTIONS as ROOT_FUNCTIONS
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import STRATEGIES as ROOT_STRATEGIES
from mmengine.registry import TASK_UTILS as ROOT_TASK_UTILS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', parent=ROOT_MODELS, scope='mmwsl', locations=['mmwsl.models'])
DATASETS = Registry('dataset', parent=ROOT_DATASETS, scope='mmwsl', locations=['mmwsl.datasets'])
DATA_SAMPLERS = Registry('data sampler', parent=ROOT_DATA_SAMPLERS, scope='mmwsl', locations=['mmwsl.datasets'])
TASK_UTILS = Registry('task util', parent=ROOT_TASK_UTILS, scope='mmwsl', locations=['mmwsl.models'])
TRANSFORMS = Registry('transform', parent=ROOT_TRANSFORMS, scope='mmwsl', locations=['mmwsl.datasets'])
HOOKS = Registry('hook', parent=ROOT_HOOKS, scope='mmwsl', locations=['mmwsl.engine'])
FUNCTIONS = Registry('function', parent=ROOT_FUNCTIONS, scope='mmwsl', locations=['mmwsl.datasets'])
STRATEGIES = Registry('strategy', parent=ROOT_STRATEGIES, scope='mmwsl', locations=['mmwsl.engine'])
