"""Regularization samples, bias and variance: functions that hooks, tools and notebooks call."""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.analysis.bias_variance import FEWEST_MODELS, Decomposition, Interval, bootstrap, decompose, pseudo_values
from mmwsl.analysis.records import RECORD, read_records, write_records
from mmwsl.analysis.regularization import (
    Flow,
    changed,
    flow,
    held_back,
    is_regularization,
    records_of_logits,
    records_of_terms,
    share,
)

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
    'held_back',
    'is_regularization',
    'pseudo_values',
    'read_records',
    'records_of_logits',
    'records_of_terms',
    'share',
    'write_records',
]
