"""Weightings by how soft the predictions are or how far they differ; none of them needs a label."""

from __future__ import annotations

import torch
from torch import Tensor

from mmwsl import functional
from mmwsl.models.weightings.base import SampleWeighting, build_weighting, inherit
from mmwsl.models.weightings.batch import SampleBatch
from mmwsl.registry import MODELS


@MODELS.register_module()
class WTTMWeighting(SampleWeighting):
    r"""Power sum of the teacher's probabilities, :math:`\sum_c (p^t_c)^{1/\tau}` (arXiv 2402.11148).

    Args:
        tau: Temperature, above 0. Weighted TTM uses that of :class:`mmwsl.models.losses.TTM`.

    Examples:
        >>> WTTMWeighting(tau=2.0)(SampleBatch(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0])))
        tensor([2.])
    """

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__()
        functional.check_temperature(tau)
        self.tau = tau

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return the power sum of each target. Shape: (N, \*)."""
        return batch.softness(self.tau)

    def extra_repr(self) -> str:
        return f'tau={self.tau}'


@MODELS.register_module()
class EntropyWeighting(SampleWeighting):
    r"""Entropy of the teacher's prediction, :math:`H_t` in nats (ER-KD, arXiv 2311.13621).

    Args:
        student: Whether to include the student's entropy, :math:`(H_t + H_t H_s / \ln C) / 2` (EA-KD).
        tau: Temperature of the predictions, above 0. The authors use 4 for ER-KD on CIFAR-100; for EA-KD 3 on
            CIFAR-100, where their code has 100 in place of ln 100, and 2 on ImageNet.

    Examples:
        >>> batch = SampleBatch(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0]))
        >>> EntropyWeighting()(batch)  # ln 4
        tensor([1.3863])
        >>> EntropyWeighting(student=True)(batch)
        tensor([1.3863])
    """

    def __init__(self, student: bool = False, tau: float = 1.0) -> None:
        super().__init__()
        functional.check_temperature(tau)
        self.student, self.tau = student, tau

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return the entropy of each target, in nats. Shape: (N, \*)."""
        entropy_S, entropy_T = batch.entropies(self.tau)
        return functional.entropy_weight(entropy_S, entropy_T, batch.choices) if self.student else entropy_T

    def extra_repr(self) -> str:
        return f'student={self.student}, tau={self.tau}'


@MODELS.register_module()
class DisagreementWeighting(SampleWeighting):
    r"""Difference of student and teacher on each class, :math:`|p^t - p^s|^\beta` (BCKD, ICCV 2023; the quality focal
    loss of CrossKD, CVPR 2024). For losses per class, as in detectors and multi-label heads.

    Args:
        beta: Exponent, at least 0.

    Examples:
        >>> teacher = torch.tensor([[3.0]]).log()  # a probability of 0.75
        >>> DisagreementWeighting()(SampleBatch(torch.zeros(1, 1), teacher, torch.tensor([[1.0]])))
        tensor([[0.2500]])
    """

    per_class = True

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not beta >= 0:
            raise ValueError(f'beta should be at least 0, got {beta}')
        self.beta = beta

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return a weight in [0, 1] for each class. Shape: (N, C, \*)."""
        return functional.disagreement(batch.preds_S, batch.preds_T, self.beta)

    def extra_repr(self) -> str:
        return f'beta={self.beta}'


@MODELS.register_module()
class ProductWeighting(SampleWeighting):
    """Product of several weightings, such as WSL's weight x the teacher's softness.

    Args:
        factors: Configs of the weightings.

    Raises:
        ValueError: If there are no factors.

    Examples:
        >>> weighting = ProductWeighting([dict(type='WTTMWeighting', tau=2.0), dict(type='EntropyWeighting')])
        >>> weighting(SampleBatch(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0])))  # 2 ln 4
        tensor([2.7726])
    """

    def __init__(self, factors: list) -> None:
        super().__init__()
        if not factors:
            raise ValueError('factors is empty: a product needs at least one weighting')
        self.factors = torch.nn.ModuleList(map(build_weighting, factors))
        inherit(self, self.factors)

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return the product of the weights. Shape: (N, \*), or (N, C, \*) if a factor is per class."""
        weights = [factor(batch) for factor in self.factors]
        largest = max(weight.dim() for weight in weights)
        aligned = (weight if weight.dim() == largest else weight.unsqueeze(1) for weight in weights)
        return torch.stack(torch.broadcast_tensors(*aligned)).prod(0)
