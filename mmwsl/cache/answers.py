"""Encode a teacher's logits for one view as a compact answer, and restore them from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = ('float32', 'float16')


@dataclass(frozen=True)
class AnswerFormat:
    r"""Convert logits to stored answers and back.

    Each answer holds the true class, the log-sum-exp of the logits and the true class's log-probability, both at
    temperature 1 in float32, and the logits: either those of all classes, or the K largest with the remaining mass at
    each tau, :math:`\log \sum_j e^{(z_j - lse) / \tau}` over the classes j that are neither among the K nor true.
    In float32 logits are stored unchanged; in float16 the log-sum-exp is subtracted first, which brings the likely
    classes near 0, where float16 is precise.

    Args:
        classes: Number of classes, C.
        top_k: Number of logits to store, K; None stores those of all classes.
        dtype: Type of the stored logits, 'float32' or 'float16'.
        taus: Temperatures at which the rest of a top K can be restored.

    Raises:
        ValueError: If top_k leaves out no class or only one, or comes without a tau, or dtype is neither of these.

    Examples:
        >>> AnswerFormat(classes=100).layout.itemsize  # bytes
        413
        >>> AnswerFormat(classes=100, top_k=5, dtype='float16', taus=(4.0, )).layout.itemsize
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
                f'top_k should be in [1, {self.classes - 2}] for {self.classes} classes, got '
                f'{self.top_k}; leave it out to store all classes'
            )
        if not self.taus or min(self.taus) <= 0:
            raise ValueError(f'top_k needs the temperatures of the soft labels, above 0, got taus={self.taus}')

    @property
    def is_exact(self) -> bool:
        """Whether logits are restored exactly."""
        return self.top_k is None and self.dtype == 'float32'

    @functools.cached_property
    def layout(self) -> np.dtype:
        """Structured type of one answer; its last field is for a checksum of the others."""
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
        """Encode the logits of a batch; the checksums are left empty.

        Args:
            logits: Shape: (N, C).
            labels: True classes. Shape: (N, ).

        Returns:
            Answers of type :attr:`layout`. Shape: (N, ).

        Raises:
            ValueError: If a logit is not finite, or too small for float16.
        """
        logits, labels = logits.double(), labels.unsqueeze(1)
        log_probs = logits.log_softmax(1)
        values = logits if self.dtype == 'float32' else log_probs
        answers = np.zeros(len(logits), self.layout)
        if self.top_k is not None:
            indices = logits.topk(self.top_k, 1).indices
            values = values.gather(1, indices)
            rest = log_probs.scatter(1, torch.cat((indices, labels), 1), -torch.inf)
            answers['indices'] = indices
            answers['tail'] = torch.stack([(rest / tau).logsumexp(1) for tau in self.taus], 1)
        answers['label'] = labels.squeeze(1)
        with np.errstate(over='ignore'):  # what does not fit is found below
            answers['values'] = values
        answers['lse'] = logits.logsumexp(1)
        answers['log_prob'] = log_probs.gather(1, labels).squeeze(1)
        if not np.isfinite(answers['values']).all():
            raise ValueError(
                f'the teacher outputs logits that are not finite in {self.dtype}; store them in '
                'float32, or check the teacher'
            )
        return answers

    def decode(self, answers: np.ndarray, tau: float | None = None) -> Tensor:
        """Restore the logits of a batch.

        Of a top K, the stored logits and the true class's are restored; the other classes share the remaining mass
        equally.

        Args:
            answers: As from :meth:`encode`. Shape: (N, ).
            tau: Temperature of the soft labels that are made of them. Needed for a top K.

        Returns:
            Logits, float32. Shape: (N, C).

        Raises:
            ValueError: If a top K was not stored for this tau.
        """
        lse = _tensor(answers['lse'])
        values = _tensor(answers['values'])
        if self.dtype == 'float16':
            values += lse.unsqueeze(1)
        if self.top_k is None:
            return values
        tau = self.checked_tau(tau)
        indices, label = _tensor(answers['indices'], np.int64), _tensor(answers['label'], np.int64).unsqueeze(1)
        others = self.classes - self.top_k - (indices != label).all(1).int()
        tail = lse + tau * (_tensor(answers['tail'])[:, self.taus.index(tau)] - others.log())
        logits = tail.unsqueeze(1).repeat(1, self.classes).scatter_(1, indices, values)
        return logits.scatter_(1, label, (lse + _tensor(answers['log_prob'])).unsqueeze(1))

    def hard_loss(self, answers: np.ndarray) -> Tensor:
        """Return the teacher's cross-entropy at temperature 1, which is exact in every format. Shape: (N, )."""
        return -_tensor(answers['log_prob'])

    def checked_tau(self, tau: float | None) -> float:
        """Return tau, or raise ValueError if a top K cannot be restored at it."""
        if tau is None or tau not in self.taus:
            raise ValueError(
                f'the top {self.top_k} can be restored at tau in {list(self.taus)}, not at {tau}: '
                'cache the teacher with --taus, or with all classes (without --top-k)'
            )
        return tau

    def label(self, answer: bytes) -> int:
        """Return the true class stored in one answer."""
        return int(np.frombuffer(answer, self.layout)['label'][0])

    def predictions(self, answers: np.ndarray) -> np.ndarray:
        """Return the most likely class of each answer. Shape: (N, )."""
        return answers['values'].argmax(1) if self.top_k is None else answers['indices'][:, 0]


def _tensor(field: np.ndarray, dtype: Any = np.float32) -> Tensor:
    return torch.from_numpy(field.astype(dtype))  # a copy: the fields of an answer are interleaved
