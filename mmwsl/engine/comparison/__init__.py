"""Compare students: alone, with plain soft labels, with weighted ones; several seeds each, one teacher for all."""

from mmwsl.engine.comparison.planning import (
    ALONE,
    CACHE,
    PLAIN,
    WEIGHTED,
    Plan,
    Trained,
    epochs_of,
    on_validation_data,
    plan,
    without_spaces,
)
from mmwsl.engine.comparison.report import METRICS, Metric, best_taught, draw, metric_of, table, warning
from mmwsl.engine.comparison.training import train_all

__all__ = [
    'ALONE',
    'CACHE',
    'METRICS',
    'PLAIN',
    'WEIGHTED',
    'Metric',
    'Plan',
    'Trained',
    'best_taught',
    'draw',
    'epochs_of',
    'metric_of',
    'on_validation_data',
    'plan',
    'table',
    'train_all',
    'warning',
    'without_spaces',
]
