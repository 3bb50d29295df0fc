from __future__ import annotations

from typing import Any

from mmwsl import functional
from mmwsl.models.losses.logit_losses import SoftCrossEntropy
from mmwsl.models.losses.weighted_loss import WeightedLoss
from mmwsl.registry import MODELS

WEIGHTINGS: dict[str, dict[str, Any]] = {
    'wsl': dict(type='WSLWeighting'),
    'one': dict(type='UniformWeighting'),
    'drop_regularization': dict(type='RegularizationWeighting', keep='others'),
    'only_regularization': dict(type='RegularizationWeighting', keep='regularization'),
    'random': dict(type='ShuffledWeighting'),
    'label_free': dict(type='LabelFreeWSLWeighting'),
}


@MODELS.register_module()
class WSLLoss(WeightedLoss):
    r"""Weighted soft labels (arXiv 2102.00650): :math:`\alpha \cdot w_i \tau^2 H(\sigma(z_t/\tau), \sigma(z_s/\tau))`.

    This is :class:`SoftCrossEntropy` weighted by :class:`mmwsl.models.weightings.WSLWeighting`. The student's own hard
    loss keeps weight 1.

    Args:
        tau: Temperature of the soft labels. The paper uses 4 on CIFAR-100 and 2 on ImageNet.
        loss_weight: The paper's alpha, 2.25 on CIFAR-100 and 2.5 on ImageNet.
        ignore_index: Class index whose targets do not count.
        reduction: 'mean' over the targets that count (0 if there are none), 'sum' or 'none'.
        weighting: Config of another weighting, or a name: 'wsl'; 'label_free', which uses the teacher's most likely
            class in place of the label; or a control that shows the effect of the weight: 'one' is plain knowledge
            distillation (KD); 'drop_regularization' is 0 for regularization samples and 1 for the others,
            'only_regularization' the reverse; 'random' permutes the weights of a batch at random.
        compile: As for :class:`SoftCrossEntropy`.

    Examples:
        >>> import torch
        >>> loss = WSLLoss(tau=4.0, loss_weight=2.25)
        >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
        >>> loss(student, teacher, torch.randint(100, (8, ))).backward()
    """

    def __init__(
        self,
        tau: float = 2.0,
        loss_weight: float = 2.5,
        ignore_index: int = functional.IGNORE_INDEX,
        reduction: str = 'mean',
        weighting: str | dict = 'wsl',
        compile: bool | str = False,
    ) -> None:
        super().__init__(SoftCrossEntropy(tau, compile), _named(weighting), loss_weight, ignore_index, reduction)
        self.weighting = weighting


def _named(weighting: Any) -> Any:
    if not isinstance(weighting, str):
        return weighting
    if weighting not in WEIGHTINGS:
        raise ValueError(
            f'weighting should be one of {tuple(WEIGHTINGS)}, or the config of a weighting, got {weighting!r}'
        )
    return WEIGHTINGS[weighting]
