"""Regularization samples: those whose soft label reduces variance more than bias (arXiv 2102.00650, Sec. 3)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.analysis.records import RECORD


class Flow(NamedTuple):
    """Shares of the samples that two epochs have in common; they sum up to 1."""

    stay: float
    """Regularization samples in both."""
    enter: float
    """Only in the later one."""
    leave: float
    """Only in the earlier one."""
    outside: float
    """In neither."""

    @property
    def kept(self) -> float:
        """Share of the earlier epoch's regularization samples that are so in the later one; NaN where none was."""
        before = self.stay + self.leave
        return self.stay / before if before else float('nan')


def regularization_share(records: np.ndarray) -> float:
    """Share of regularization samples among the records, in [0, 1].

    NaN without records, or where samples of mixed classes, which have no a and b, are among them.

    Examples:
        >>> records = np.zeros(4, RECORD)
        >>> records['a'], records['b'] = -0.5, [0.2, 0.9, -0.9, 0.4]
        >>> regularization_share(records)
        0.5
    """
    return _mean(is_regularization(records), records)


def lowered_logit_share(records: np.ndarray) -> float:
    """Share of the samples with b > |a|: their soft label lowers the true class's logit, as the teacher is less sure.

    The other regularization samples have b < -|a|: their soft label raises it by more than the hard label does.

    Examples:
        >>> records = np.zeros(4, RECORD)
        >>> records['a'], records['b'] = -0.5, [0.2, 0.9, -0.9, 0.4]
        >>> lowered_logit_share(records)
        0.25
    """
    return _mean(records['b'] > np.abs(records['a']), records)


def flow(before: np.ndarray, after: np.ndarray) -> Flow:
    """How samples move into and out of the set from one epoch to another.

    If membership in one epoch said nothing of the other, ``kept`` would be the later epoch's share.

    Args:
        before: Records of the earlier epoch. Of a sample that has several the first counts. Shape: (N, ).
        after: Records of the later one. Shape: (M, ).

    Raises:
        ValueError: If the two have no sample in common, or samples of mixed classes.
    """
    _, first, second = np.intersect1d(before['index'], after['index'], return_indices=True)
    if len(first) == 0:
        raise ValueError(
            f'two epochs with {len(before)} and {len(after)} records have no sample in common: are they of one run?'
        )
    was, now = _members(before)[first], _members(after)[second]
    return Flow(*(float(part.mean()) for part in (was & now, ~was & now, was & ~now, ~was & ~now)))


def changed(epochs: list[np.ndarray]) -> float:
    """Share of the samples, of those in all epochs, that are regularization samples in some epoch but not in all.

    Args:
        epochs: Records of each epoch. Of a sample that has several in an epoch the first counts.

    Raises:
        ValueError: If there are samples of mixed classes.
    """
    common = functools.reduce(np.intersect1d, [records['index'] for records in epochs])
    # the records are sorted by index, so the first of each is where it would be put in
    members = [_members(records)[np.searchsorted(records['index'], common)] for records in epochs]
    return float((np.any(members, 0) & ~np.all(members, 0)).mean())


def is_regularization(records: np.ndarray) -> np.ndarray:
    """Which records are of regularization samples, |b| > |a|. Shape: (N, ), bool."""
    return np.abs(records['b']) > np.abs(records['a'])


def _members(records: np.ndarray) -> np.ndarray:
    """As :func:`is_regularization`, for records of which each is known to be in the set or not."""
    if np.isnan(records['b']).any():
        raise ValueError(
            'samples of mixed classes (mixup, cutmix) are neither inside nor outside the set of '
            'regularization samples: record a run without batch_augments'
        )
    return is_regularization(records)


def records_of_logits(index: list[int], preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float) -> np.ndarray:
    """Records as the loss would have made them.

    Args:
        index: Of the samples in their dataset. Shape: (N, ).
        preds_S: Student logits. Shape: (N, C).
        preds_T: Teacher logits. Shape: (N, C).
        target: Class indices. Shape: (N, ).
        tau: Temperature of the soft labels, above 0.

    Returns:
        Records of dtype ``RECORD``. Shape: (N, ).

    Raises:
        TypeError, ValueError: As of :func:`functional.wsl_loss`.
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
    """Records of what ``WSLLoss.sample_terms`` says. Shape: (N, ) each."""
    records = np.empty(len(index), RECORD)
    records['index'] = index
    for name in RECORD.names[1:]:  # type: ignore[index]
        records[name] = torch.as_tensor(terms[name]).detach().cpu().numpy()
    return records
