"""Regularization samples, whose soft label reduces variance more than bias (arXiv 2102.00650, Sec. 3)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.analysis.records import RECORD


class Flow(NamedTuple):
    """Changes of the set of regularization samples between two epochs, as shares of their common samples."""

    stay: float
    """Share of samples in the set in both epochs."""
    enter: float
    """Share of samples in the set only in the later epoch."""
    leave: float
    """Share of samples in the set only in the earlier epoch."""
    outside: float
    """Share of samples in the set in neither epoch."""

    @property
    def kept(self) -> float:
        """Share of the earlier epoch's regularization samples that are in the later one; NaN if there were none."""
        before = self.stay + self.leave
        return self.stay / before if before else float('nan')


def regularization_share(records: np.ndarray) -> float:
    """Return the share of regularization samples among the records, in [0, 1].

    It is NaN without records, or if they include samples of mixed classes, which have no a and b.

    Examples:
        >>> records = np.zeros(4, RECORD)
        >>> records['a'], records['b'] = -0.5, [0.2, 0.9, -0.9, 0.4]
        >>> regularization_share(records)
        0.5
    """
    return _mean(is_regularization(records), records)


def lowered_logit_share(records: np.ndarray) -> float:
    """Return the share of samples whose soft label lowers the true class's logit, b > |a|: the teacher is less sure.

    The other regularization samples have b < -|a|: their soft label raises this logit by more than the hard label does.

    Examples:
        >>> records = np.zeros(4, RECORD)
        >>> records['a'], records['b'] = -0.5, [0.2, 0.9, -0.9, 0.4]
        >>> lowered_logit_share(records)
        0.25
    """
    return _mean(records['b'] > np.abs(records['a']), records)


def flow(before: np.ndarray, after: np.ndarray) -> Flow:
    """Measure how samples enter and leave the set of regularization samples from one epoch to another.

    If membership in the two epochs were independent, ``kept`` would equal the later epoch's share.

    Args:
        before: Records of the earlier epoch. If a sample has several, the first one counts. Shape: (N, ).
        after: Records of the later epoch. Shape: (M, ).

    Raises:
        ValueError: If the two have no sample in common, or contain samples of mixed classes.
    """
    _, first, second = np.intersect1d(before['index'], after['index'], return_indices=True)
    if len(first) == 0:
        raise ValueError(
            f'two epochs with {len(before)} and {len(after)} records have no sample in common: give two of one run'
        )
    was, now = _members(before)[first], _members(after)[second]
    return Flow(*(float(part.mean()) for part in (was & now, ~was & now, was & ~now, ~was & ~now)))


def changed(epochs: list[np.ndarray]) -> float:
    """Return the share of samples that are regularization samples in some epochs but not in all.

    Args:
        epochs: Records of each epoch. Only samples in all of them count. If a sample has several records in an epoch,
            the first one counts.

    Raises:
        ValueError: If there are samples of mixed classes.
    """
    common = functools.reduce(np.intersect1d, [records['index'] for records in epochs])
    # records are sorted by index, so searchsorted finds the first of each sample
    members = [_members(records)[np.searchsorted(records['index'], common)] for records in epochs]
    return float((np.any(members, 0) & ~np.all(members, 0)).mean())


def is_regularization(records: np.ndarray) -> np.ndarray:
    """Return the mask of the regularization samples, |b| > |a|. Shape: (N, ), bool."""
    return np.abs(records['b']) > np.abs(records['a'])


def _members(records: np.ndarray) -> np.ndarray:
    """Mask of the regularization samples; raises ValueError if membership of a sample is undefined."""
    if np.isnan(records['b']).any():
        raise ValueError(
            'samples of mixed classes (mixup, cutmix) are neither inside nor outside the set of '
            'regularization samples: use a run without batch_augments'
        )
    return is_regularization(records)


def records_of_logits(index: list[int], preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> np.ndarray:
    """Compute the sample records that the loss would have produced for these logits.

    Args:
        index: Indices of the samples in their dataset. Length: N.
        preds_S: Student logits. Shape: (N, C).
        preds_T: Teacher logits. Shape: (N, C).
        target: Class indices. Shape: (N, ).
        tau: Temperature of the soft labels, above 0.

    Returns:
        Records of dtype :data:`mmwsl.analysis.RECORD`. Shape: (N, ).

    Raises:
        TypeError, ValueError: As :func:`mmwsl.functional.wsl_loss`.
    """
    a, b = functional.bias_and_variance_gradients(preds_S, preds_T, target, tau)
    return records_of_terms(
        index,
        dict(
            w=functional.wsl_weight(preds_S, preds_T, target),
            L_s=functional.hard_loss(preds_S, target),
            L_t=functional.hard_loss(preds_T, target),
            a=a,
            b=b,
        ),
    )


def _mean(members: np.ndarray, records: np.ndarray) -> float:
    known = len(records) > 0 and not np.isnan(records['b']).any()
    return float(members.mean()) if known else float('nan')


def records_of_terms(index: list[int], terms: dict[str, Tensor]) -> np.ndarray:
    """Convert the terms of ``WSLLoss.sample_terms`` to sample records.

    Args:
        index: Indices of the samples in their dataset. Length: N.
        terms: Terms by name. Shape: (N, ) each.

    Returns:
        Records of dtype :data:`mmwsl.analysis.RECORD`. Shape: (N, ).
    """
    records = np.empty(len(index), RECORD)
    records['index'] = index
    for name in RECORD.names[1:]:  # type: ignore[index]
        records[name] = torch.as_tensor(terms[name]).detach().cpu().numpy()
    return records
