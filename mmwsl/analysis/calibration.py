"""Fit the temperature at which a classifier's probabilities are calibrated, on images that it was not trained on."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.optimize import brentq
from torch import Tensor

from mmwsl.functional import hard_loss

_RANGE = (0.01, 100.0)
_ROWS = 8192  # images that are computed in float64 at a time


class Calibration(NamedTuple):
    """A fitted temperature, with the mean loss of the images without and with it."""

    tau: float
    before: float
    """Mean loss at temperature 1, in nats."""
    after: float
    """Mean loss at ``tau``, in nats."""
    images: int


def fit_temperature(logits: Tensor, labels: Tensor) -> Calibration:
    r"""Find the temperature tau that minimises the mean cross-entropy of logits / tau with the labels.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599, Sec. 4.2. The loss is convex in
    :math:`1 / \tau`; the minimum is where its slope, the mean of :math:`\sum_c p_c z_c - z_y`, is 0.

    Args:
        logits: Logits of images that the network was not trained on. Shape: (N, C).
        labels: True classes, int64. Shape: (N, ).

    Raises:
        ValueError: If the minimum is not in [0.01, 100], as for a network that makes no error or is no better than
            chance.
    """
    sharpest, softest = (_slope(logits, labels, tau) for tau in _RANGE)
    if softest >= 0 or sharpest <= 0:
        reason = 'is no better than chance on them' if softest >= 0 else 'makes no error on them'
        raise ValueError(
            f'no temperature in {list(_RANGE)} is the best for {len(labels)} held-out images: the network '
            f'{reason}. Fit on more images (--folds), or check the checkpoint with tools/test.py'
        )
    # solved for the logarithm, so that small and large temperatures are found equally well
    tau = math.exp(brentq(lambda log_tau: _slope(logits, labels, math.exp(log_tau)), *map(math.log, _RANGE), xtol=1e-9))
    return Calibration(tau, _mean_loss(logits, labels, 1.0), _mean_loss(logits, labels, tau), len(labels))


def _slope(logits: Tensor, labels: Tensor, tau: float) -> float:
    """Derivative of the mean loss with respect to 1 / tau."""
    total = 0.0
    for z, y in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        # relative to the true class's logit: the slope of a network that is sure and right is nearly 0
        margins = z.double() - z.double().gather(1, y.unsqueeze(1))
        total += float(((margins / tau).softmax(1) * margins).sum())
    return total / len(labels)


def _mean_loss(logits: Tensor, labels: Tensor, tau: float) -> float:
    parts = zip(logits.split(_ROWS), labels.split(_ROWS), strict=True)
    return math.fsum(float(hard_loss(z.double() / tau, y).sum()) for z, y in parts) / len(labels)
