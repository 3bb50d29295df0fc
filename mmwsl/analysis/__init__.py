"""Functions for hooks, tools and notebooks that analyse regularization samples, bias and variance."""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.analysis.bias_variance import FEWEST_MODELS, Decomposition, Interval, bootstrap, decompose, pseudo_values
from mmwsl.analysis.records import RECORD, read_records, write_records
from mmwsl.analysis.regularization import (
    Flow,
    changed,
    flow,
    is_regularization,
    lowered_logit_share,
    records_of_logits,
    records_of_terms,
    regularization_share,
)
from mmwsl.utils.old_names import renamed

__all__ = [
    'FEWEST_MODELS',
    'RECORD',
    'Decomposition',
    'Flow',
    'Interval',
    'bootstrap',
    'changed',
    'decompose',
    'flow',
    'is_regularization',
    'lowered_logit_share',
    'pseudo_values',
    'read_records',
    'records_of_logits',
    'records_of_terms',
    'regularization_share',
    'write_records',
]

__getattr__ = renamed(__name__, share='regularization_share', held_back='lowered_logit_share')
