"""What is kept of a teacher's answer to one view, and how its logits are made from that again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = ('float32', 'float16')


@dataclass(frozen=True)
class RecordFormat:
    r"""The fields of a record, and the way from logits to records and back.

    Each record holds the true class, the log-sum-exp of the logits and the true class's log-probability, at temperature
    1 in float32, and the logits: of all classes, or of the K largest with what is left at each tau,
    :math:`\log \sum_j e^{(z_j - lse) / \tau}` over the classes j that are neither among the K nor true. In float32
    logits are kept as they are, in float16 less the log-sum-exp: the likely classes are then near 0, where float16 is
    fine.

    Args:
        classes: C.
        top_k: K; None keeps all classes.
        dtype: 'float32' or 'float16', of the logits that are kept.
        taus: Temperatures at which the rest of a top K can be restored.

    Raises:
        ValueError: If the top K are all classes or all but one, come without a tau, or if dtype is another.

    Examples:
        >>> RecordFormat(classes=100).layout.itemsize  # bytes
        413
        >>> RecordFormat(classes=100, top_k=5, dtype='float16', taus=(4.0, )).layout.itemsize
        32
    """

    classes: int
    top_k: int | None = None
    dtype: str = 'float32'
    taus: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f'dtype should be one of {_DTYPES}, got {self.dtype!r}')
        if self.top_k is None:
            return
        if not 1 <= self.top_k <= self.classes - 2:
            raise ValueError(
                f'top_k should lie in [1, {self.classes - 2}] for {self.classes} classes, got '
                f'{self.top_k}; leave it out to keep all classes'
            )
        if not self.taus or min(self.taus) <= 0:
            raise ValueError(f'a top K needs the temperatures of the soft labels, above 0, got taus={self.taus}')

    @property
    def is_exact(self) -> bool:
        """Whether logits come back as they were."""
        return self.top_k is None and self.dtype == 'float32'

    @functools.cached_property
    def layout(self) -> np.dtype:
        """Of one record; its last field is for a checksum of the others."""
        index = np.min_scalar_type(self.classes - 1)
        fields: list[tuple] = [('label', index)]
        if self.top_k is not None:
            fields += [('indices', index, (self.top_k,)), ('tail', np.float32, (len(self.taus),))]
        return np.dtype(
            [
                *fields,
                ('values', self.dtype, (self.top_k or self.classes,)),
                ('lse', np.float32),
                ('log_prob', np.float32),
                ('check', np.uint32),
            ]
        )

    def encode(self, logits: Tensor, labels: Tensor) -> np.ndarray:
        """Records of a batch, without their checksums.

        Args:
            logits: Shape: (N, C).
            labels: True classes. Shape: (N, ).

        Returns:
            Records. Shape: (N, ).

        Raises:
            ValueError: If a logit is not finite, or too small for float16.
        """
        logits, labels = logits.double(), labels.unsqueeze(1)
        log_probs = logits.log_softmax(1)
        values = logits if self.dtype == 'float32' else log_probs
        records = np.zeros(len(logits), self.layout)
        if self.top_k is not None:
            indices = logits.topk(self.top_k, 1).indices
            values = values.gather(1, indices)
            rest = log_probs.scatter(1, torch.cat((indices, labels), 1), -torch.inf)
            records['indices'] = indices
            records['tail'] = torch.stack([(rest / tau).logsumexp(1) for tau in self.taus], 1)
        records['label'] = labels.squeeze(1)
        with np.errstate(over='ignore'):  # what does not fit is found below
            records['values'] = values
        records['lse'] = logits.logsumexp(1)
        records['log_prob'] = log_probs.gather(1, labels).squeeze(1)
        if not np.isfinite(records['values']).all():
            raise ValueError(
                f'the teacher puts out logits that are not finite in {self.dtype}; keep them in '
                'float32, or look at the teacher'
            )
        return records

    def decode(self, records: np.ndarray, tau: float | None = None) -> Tensor:
        """Logits of a batch: those of a top K and of the true class, the others with equal shares of what is left.

        Args:
            records: Shape: (N, ).
            tau: Temperature of the soft labels that are made of them. Needed for a top K.

        Returns:
            Logits, float32. Shape: (N, C).

        Raises:
            ValueError: If a top K has no record for tau.
        """
        lse = _tensor(records['lse'])
        values = _tensor(records['values'])
        if self.dtype == 'float16':
            values += lse.unsqueeze(1)
        if self.top_k is None:
            return values
        tau = self.checked_tau(tau)
        indices, label = _tensor(records['indices'], np.int64), _tensor(records['label'], np.int64).unsqueeze(1)
        others = self.classes - self.top_k - (indices != label).all(1).int()
        tail = lse + tau * (_tensor(records['tail'])[:, self.taus.index(tau)] - others.log())
        logits = tail.unsqueeze(1).repeat(1, self.classes).scatter_(1, indices, values)
        return logits.scatter_(1, label, (lse + _tensor(records['log_prob'])).unsqueeze(1))

    def hard_loss(self, records: np.ndarray) -> Tensor:
        """The teacher's cross-entropy with the true class, at temperature 1 and as precise as ever. Shape: (N, )."""
        return -_tensor(records['log_prob'])

    def checked_tau(self, tau: float | None) -> float:
        """tau, or a ValueError where a top K cannot be completed for it."""
        if tau is None or tau not in self.taus:
            raise ValueError(
                f'the top {self.top_k} can be completed at tau in {list(self.taus)} and not at {tau}: '
                'cache the teacher with --taus, or with all classes (without --top-k)'
            )
        return tau

    def label(self, record: bytes) -> int:
        """The true class of one record."""
        return int(np.frombuffer(record, self.layout)['label'][0])

    def predictions(self, records: np.ndarray) -> np.ndarray:
        """The most likely class. Shape: (N, )."""
        return records['values'].argmax(1) if self.top_k is None else records['indices'][:, 0]


def _tensor(field: np.ndarray, dtype: Any = np.float32) -> Tensor:
    return torch.from_numpy(field.astype(dtype))  # a copy: the fields of a record lie side by side
