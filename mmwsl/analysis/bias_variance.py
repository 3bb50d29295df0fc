r"""Bias and variance of a network's predictions under the cross-entropy (Heskes 1998).

Let f_k be the prediction of the k-th of K models, each trained on a resample of the training set. Their mean is the
normalised geometric mean

.. math:: \bar f = \frac 1 Z \exp\Big(\frac 1 K \sum_k \log f_k\Big)

and for an image of class y the expected loss splits exactly:

.. math::
    \frac 1 K \sum_k -\log f_{k,y} = -\log \bar f_y + \frac 1 K \sum_k KL(\bar f \| f_k)

bias first, variance second. Variance is -log Z, since log f_bar and the mean of the log f_k differ by log Z.

With few models their mean follows them, and the split puts too little into variance, and as much too much into bias: to
first order, variance / K. :func:`pseudo_values` take that out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

FEWEST_MODELS = 5
"""Of fewer models no interval is given: a resample of them has hardly another mean."""


class Decomposition(NamedTuple):
    """In nats; bias and variance sum up to the loss."""

    bias: np.ndarray
    variance: np.ndarray
    loss: np.ndarray


class Interval(NamedTuple):
    """An estimate with the ends of its interval, which are NaN where there are too few models for one."""

    value: float
    low: float
    high: float


def decompose(log_probs: np.ndarray, target: np.ndarray) -> Decomposition:
    """Bias, variance and expected loss of each image, for these K models as they are.

    Args:
        log_probs: Log-probabilities of K models. Shape: (K, N, C).
        target: Classes. Shape: (N, ).

    Returns:
        In nats. Shape: (N, ) each.

    Raises:
        ValueError: If shapes do not belong together, or these are no log-probabilities or classes.

    Examples:
        >>> sure, unsure = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
        >>> split = decompose(np.stack([sure, unsure]), np.array([0]))
        >>> split.bias.round(4), split.variance.round(4), split.loss.round(4)  # f_bar is 0.75: -ln 0.75, and the rest
        (array([0.2877]), array([0.1116]), array([0.3993]))
    """
    log_probs, target = _checked(log_probs, target)
    loss, variance = _losses(log_probs, target).mean(0), _variance(log_probs.mean(0))
    return Decomposition(loss - variance, variance, loss)


def pseudo_values(log_probs: np.ndarray, target: np.ndarray) -> Decomposition:
    r"""The jackknife's pseudo-values over the models, :math:`K \theta - (K - 1) \theta_{-k}`.

    Their mean over k estimates what :func:`decompose` would give with ever more models, but for errors of order
    1 / K^2. Each belongs to one model, so to resample models is to resample these.

    Args:
        log_probs: Log-probabilities of two models or more. Shape: (K, N, C).
        target: Classes. Shape: (N, ).

    Returns:
        In nats; single values may be negative. Shape: (K, N) each.

    Raises:
        ValueError: As of :func:`decompose`, or if there is but one model.
    """
    log_probs, target = _checked(log_probs, target)
    models = len(log_probs)
    if models < 2:
        raise ValueError('variance between models needs at least two of them, got 1')
    total = log_probs.sum(0)
    without = np.stack([_variance((total - one) / (models - 1)) for one in log_probs])
    variance = models * _variance(total / models) - (models - 1) * without
    loss = _losses(log_probs, target)
    return Decomposition(loss - variance, variance, loss)


def bootstrap(values: np.ndarray, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean over models and images, with a percentile interval from resampling both at once.

    The interval says how far the mean would move with other runs (training resamples, initial weights) *and* other test
    images. It knows nothing of another training set, teacher or recipe, and there is none for fewer than
    :data:`FEWEST_MODELS` models. For the difference between two configs give the difference of their values: it is then
    paired over runs and images.

    Args:
        values: A row for each model and a column for each image, e.g. :func:`pseudo_values`. Shape: (K, N).
        draws: Resamples.
        level: Of the interval.
        seed: Of the draws.

    Raises:
        ValueError: If values have another shape.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f'values should have a row for each model and a column for each image, got {values.shape}')
    models, images = values.shape
    if models < FEWEST_MODELS:
        return Interval(float(values.mean()), float('nan'), float('nan'))
    generator = np.random.default_rng(seed)
    means = [_counts(generator, models) @ values @ _counts(generator, images) / values.size for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _counts(generator: np.random.Generator, size: int) -> np.ndarray:
    """How often a resample draws each. Shape: (size, )."""
    return np.bincount(generator.integers(size, size=size), minlength=size)


def _variance(mean_log_probs: np.ndarray) -> np.ndarray:
    """-log Z. Shape: (N, ) of (N, C)."""
    return -logsumexp(mean_log_probs, axis=-1)


def _losses(log_probs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Shape: (K, N)."""
    return -log_probs[:, np.arange(len(target)), target]


def _checked(log_probs: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_probs, target = np.asarray(log_probs, np.float64), np.asarray(target)
    if log_probs.ndim != 3 or 0 in log_probs.shape or target.shape != log_probs.shape[1:2]:
        raise ValueError(
            f'log_probs should have shape (K, N, C) and target (N, ), got {log_probs.shape} and {target.shape}'
        )
    if target.min() < 0 or target.max() >= log_probs.shape[2]:
        raise ValueError(f'target should lie in [0, {log_probs.shape[2]}), got {target.min()} to {target.max()}')
    sums = logsumexp(log_probs, axis=-1, keepdims=True)
    if not np.abs(sums).max() < 1e-3:  # not: it may be NaN
        raise ValueError(
            'log_probs should be the logarithms of probabilities that sum up to 1, but a sum is '
            f'exp({np.abs(sums).max():.3g}). Apply log_softmax to logits'
        )
    return log_probs - sums, target  # what float32 rounded off would be taken for variance
