r"""Bias and variance of a network's predictions under the cross-entropy (Heskes 1998).

Let f_k be the prediction of the k-th of K models, each trained on a resample of the training set. Their mean is the
normalised geometric mean

.. math:: \bar f = \frac 1 Z \exp\Big(\frac 1 K \sum_k \log f_k\Big)

and for an image of class y the expected loss splits exactly:

.. math::
    \frac 1 K \sum_k -\log f_{k,y} = -\log \bar f_y + \frac 1 K \sum_k KL(\bar f \| f_k)

into bias, the first term, and variance, the second. Variance is -log Z, since log f_bar and the mean of the log f_k
differ by log Z.

With few models the mean follows each of them, so the variance is underestimated and the bias overestimated by the same
amount: to first order, by variance / K. :func:`pseudo_values` correct this.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

FEWEST_MODELS = 5
"""Fewest models for an interval: resampling fewer of them hardly changes the mean."""


class Decomposition(NamedTuple):
    """Bias, variance and their sum, the expected loss, in nats."""

    bias: np.ndarray
    variance: np.ndarray
    loss: np.ndarray


class Interval(NamedTuple):
    """An estimate with the lower and upper end of its interval; both ends are NaN if there are too few models."""

    value: float
    low: float
    high: float


def decompose(log_probs: np.ndarray, target: np.ndarray) -> Decomposition:
    """Split the expected loss of each image into bias and variance, for exactly these K models.

    Args:
        log_probs: Log-probabilities of K models. Shape: (K, N, C).
        target: True classes. Shape: (N, ).

    Returns:
        Bias, variance and loss in nats. Shape: (N, ) each.

    Raises:
        ValueError: If shapes do not match, or values are not log-probabilities or classes.

    Examples:
        >>> sure, unsure = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
        >>> split = decompose(np.stack([sure, unsure]), np.array([0]))
        >>> split.bias.round(4), split.variance.round(4), split.loss.round(4)  # f_bar is 0.75, so bias is -ln 0.75
        (array([0.2877]), array([0.1116]), array([0.3993]))
    """
    log_probs, target = _checked(log_probs, target)
    loss, variance = _losses(log_probs, target).mean(0), _variance(log_probs.mean(0))
    return Decomposition(loss - variance, variance, loss)


def pseudo_values(log_probs: np.ndarray, target: np.ndarray) -> Decomposition:
    r"""Compute the jackknife's pseudo-values over the models, :math:`K \theta - (K - 1) \theta_{-k}`.

    Their mean over k estimates the result of :func:`decompose` for infinitely many models, up to errors of order
    1 / K^2. Each value belongs to one model, so resampling models means resampling these values.

    Args:
        log_probs: Log-probabilities of two models or more. Shape: (K, N, C).
        target: True classes. Shape: (N, ).

    Returns:
        Bias, variance and loss in nats; single values may be negative. Shape: (K, N) each.

    Raises:
        ValueError: As :func:`decompose`, or if there is only one model.
    """
    log_probs, target = _checked(log_probs, target)
    models = len(log_probs)
    if models < 2:
        raise ValueError('the variance between models needs at least two models, got 1: train more of them')
    total = log_probs.sum(0)
    without = np.stack([_variance((total - one) / (models - 1)) for one in log_probs])
    variance = models * _variance(total / models) - (models - 1) * without
    loss = _losses(log_probs, target)
    return Decomposition(loss - variance, variance, loss)


def bootstrap(values: np.ndarray, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean over models and images, with a percentile interval from resampling both at once.

    The interval covers the variation between runs (training resamples, initial weights) *and* between test images, but
    not another training set, teacher or recipe. With fewer than :data:`FEWEST_MODELS` models there is no interval. To
    compare two configs, pass the difference of their values, which is then paired over runs and images.

    Args:
        values: A row for each model and a column for each image, e.g. from :func:`pseudo_values`. Shape: (K, N).
        draws: Number of resamples.
        level: Coverage of the interval.
        seed: Seed of the resamples.

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
    """Draw a resample, and count how often it contains each item. Shape: (size, )."""
    return np.bincount(generator.integers(size, size=size), minlength=size)


def _variance(mean_log_probs: np.ndarray) -> np.ndarray:
    """Variance -log Z from mean log-probabilities. Shape: (N, C) to (N, )."""
    return -logsumexp(mean_log_probs, axis=-1)


def _losses(log_probs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cross-entropies. Shape: (K, N)."""
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
    if not np.abs(sums).max() < 1e-3:  # with `not`, since NaN compares false
        raise ValueError(
            'log_probs should be the logarithms of probabilities that sum to 1, but one sum is '
            f'exp({np.abs(sums).max():.3g}). Apply log_softmax to logits'
        )
    return log_probs - sums, target  # normalised, since rounding in float32 would count as variance
