from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModel, ModuleList
from mmpretrain.models.heads import ClsHead
from torch import Tensor

from mmwsl.registry import MODELS
from mmwsl.utils.checkpoint import load_network

COMBINATIONS = ('probabilities', 'logits')


@MODELS.register_module()
class EnsembleTeacher(BaseModel):
    """Several classifiers combined into one teacher: "a well-trained network or an ensemble of them" (arXiv
    2102.00650).

    From outside it is an ordinary classifier whose ``head`` outputs logits. It can teach and be tested, but not be
    trained: its members are trained separately.

    Args:
        models: Configs of the members. All receive the ensemble's input.
        ckpts: Checkpoints of the members in the same order, loaded strictly. None leaves the members untrained.
        combine: 'probabilities' for the log of their mean probabilities, 'logits' for their mean logits.
        data_preprocessor: As for mmpretrain's classifiers; it serves all members.

    Raises:
        ValueError: If there are no members, not as many checkpoints as members, another ``combine``, a member with a
            data_preprocessor of its own, or members with different numbers of classes; or as
            :func:`mmwsl.utils.load_network`.
    """

    def __init__(
        self,
        models: Sequence[dict],
        ckpts: Sequence[str] | None = None,
        combine: str = 'probabilities',
        data_preprocessor: Any = None,
    ) -> None:
        super().__init__(data_preprocessor)
        _check_arguments(models, ckpts, combine)
        self.combine = combine
        self.members = ModuleList(MODELS.build(model) for model in models)
        _check_classes(self.members)
        self.head = ClsHead()  # returns its input, where recorders look for logits
        for member, ckpt in zip(self.members, ckpts or (), strict=ckpts is not None):
            load_network(member, ckpt)
        self._is_init = ckpts is not None  # tells mmengine that nothing is left to initialise

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor') -> Any:
        """Predict as a classifier of mmpretrain does.

        Args:
            inputs: Preprocessed images. Shape: (N, 3, H, W).
            data_samples: With mode 'predict', the samples to write predictions to.
            mode: 'tensor' or 'predict'.

        Returns:
            Logits of shape (N, C) in mode 'tensor', N DataSamples with ``pred_score`` and ``pred_label`` in mode
            'predict'.

        Raises:
            ValueError: For another mode.
        """
        if mode not in ('tensor', 'predict'):
            raise ValueError(
                f"an EnsembleTeacher has only the modes 'tensor' and 'predict', and no loss, got {mode!r}. "
                "Record its logits at 'head', as WSLDistiller does by default, and train its members "
                'separately, with their configs in configs/vanilla/'
            )
        features = (self._combined(torch.stack([member(inputs) for member in self.members])),)
        return self.head(features) if mode == 'tensor' else self.head.predict(features, data_samples)

    def _combined(self, logits: Tensor) -> Tensor:
        """Combine the members' logits. Shape: (M, N, C) to (N, C)."""
        if self.combine == 'logits':
            return logits.mean(0)
        # in float32 at least: a mean of half-precision probabilities loses the small ones
        log_probabilities = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return log_probabilities.logsumexp(0) - math.log(len(logits))


def _check_arguments(models: Sequence[dict], ckpts: Sequence[str] | None, combine: str) -> None:
    if not models:
        raise ValueError('models is empty: an ensemble needs at least one member')
    if ckpts is not None and len(ckpts) != len(models):
        raise ValueError(f'{len(models)} models need as many ckpts, got {len(ckpts)}')
    if combine not in COMBINATIONS:
        raise ValueError(f'combine should be one of {COMBINATIONS}, got {combine!r}')
    if any(model.get('data_preprocessor') for model in models):
        raise ValueError(
            'a member of an ensemble cannot have a data_preprocessor of its own: set the data_preprocessor of the '
            'ensemble'
        )


def _check_classes(members: ModuleList) -> None:
    classes = [member.head.num_classes for member in members]
    if len(set(classes)) > 1:
        raise ValueError(f'the members of an ensemble should predict the same classes, got {classes} classes')
