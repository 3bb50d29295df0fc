from __future__ import annotations

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from mmwsl import functional
from mmwsl.cache.teacher_losses import TeacherLosses
from mmwsl.models.weightings.base import SampleWeighting
from mmwsl.models.weightings.batch import SampleBatch
from mmwsl.registry import MODELS


@MODELS.register_module()
class WSLWeighting(SampleWeighting):
    r"""The paper's weight, :math:`w = 1 - \exp(-L_s / L_t)` (arXiv 2102.00650, Sec. 4).

    On the images that a teacher was trained on, L_t is nearly 0 and w nearly 1. The arguments offer other sources and
    scales of L_t.

    Args:
        teacher_losses: File made by tools/teacher_losses.py with L_t of each training image, for example from networks
            that were not trained on the image (out of fold). None computes L_t from the teacher's logits.
        teacher_tau: Temperature at which L_t is computed from the teacher's logits, fitted on held-out images
            (``tools/teacher_losses.py --calibrate``). In the paper it is 1.
        scale_free: Whether to divide L_s and L_t by their running means over the training batches, which are equal in
            all processes and part of the checkpoint.
        momentum: Weight of the previous running mean when a batch is added to it.

    Raises:
        ValueError: If both a file and a temperature are given, or a number is out of range.
        CacheError: If the file is missing or damaged.

    Examples:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> WSLWeighting()(SampleBatch(student, teacher, torch.tensor([0])))  # 1 - exp(-ln 2 / ln 4/3)
        tensor([0.9101])
    """

    table: Tensor
    running: Tensor

    def __init__(
        self,
        teacher_losses: str | None = None,
        teacher_tau: float = 1.0,
        scale_free: bool = False,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        functional.check_temperature(teacher_tau)
        if teacher_losses is not None and teacher_tau != 1:
            raise ValueError(
                f"teacher_tau={teacher_tau} applies to the teacher's logits, and teacher_losses="
                f'{teacher_losses!r} replaces them: set only one of the two'
            )
        if not 0 <= momentum < 1:
            raise ValueError(f'momentum should be in [0, 1), got {momentum}')
        self.teacher_losses = None if teacher_losses is None else TeacherLosses.load(teacher_losses)
        self.per_image = self.needs_data_samples = self.needs_classes = teacher_losses is not None
        self.teacher_tau, self.scale_free, self.momentum = teacher_tau, scale_free, momentum
        if self.teacher_losses is not None:
            self.register_buffer('table', torch.as_tensor(self.teacher_losses.losses), persistent=False)
        if scale_free:  # means of L_s and L_t, and the share of them that has been filled in
            self.register_buffer('running', torch.zeros(3, dtype=torch.float64))

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return weights in [0, 1]. Shape: (N, \*)."""
        teacher = self._teacher_loss(batch)
        if teacher is batch.teacher_hard_loss and not self.scale_free:
            return batch.wsl_weight
        student = batch.student_hard_loss
        if self.scale_free:
            mean_S, mean_T = self._means(student, teacher, batch.kept).to(student.dtype)
            student, teacher = student / mean_S, teacher / mean_T
        return functional.weight_of_losses(student, teacher)

    def _teacher_loss(self, batch: SampleBatch) -> Tensor:
        r"""L_t from the configured source. Shape: (N, \*)."""
        if self.teacher_losses is not None:
            batch.applied_teacher_loss = self._looked_up(batch)
        elif self.teacher_tau != 1:
            batch.applied_teacher_loss = batch.hard_loss(functional.at_least_float32(batch.preds_T) / self.teacher_tau)
        else:
            return batch.teacher_hard_loss
        return batch.applied_teacher_loss

    def _looked_up(self, batch: SampleBatch) -> Tensor:
        """L_t of the images, from the file. Shape: (N, )."""
        if batch.kept.shape != (len(batch.kept),):
            raise ValueError(
                f'teacher_losses has one value per image, and the targets have shape {tuple(batch.kept.shape)}: use '
                'it for classification, or remove it from the weighting'
            )
        return self.table[batch.sample_idx].to(batch.student_hard_loss.dtype)

    def _means(self, student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
        """Running means of L_s and L_t. Shape: (2, )."""
        if self.training:
            sums = torch.stack(
                [
                    torch.where(kept, values, 0.0).sum().double()
                    for values in (student, teacher, torch.ones_like(student))
                ]
            )
            all_reduce(sums)
            seen = torch.cat((sums[:2] / sums[2].clamp(min=1), torch.ones_like(sums[2:])))
            self.running.copy_(torch.where(sums[2] > 0, self.running.lerp(seen, 1 - self.momentum), self.running))
        filled = self.running[2]  # like Adam's bias correction; before the first batch the losses stay as they are
        means = (self.running[:2] / filled.clamp(min=1e-12)).clamp(min=functional.EPSILON)
        return torch.where(filled > 0, means, 1.0)

    def extra_repr(self) -> str:
        return (
            f'teacher_losses={self.teacher_losses is not None}, teacher_tau={self.teacher_tau}, '
            f'scale_free={self.scale_free}'
        )


@MODELS.register_module()
class LabelFreeWSLWeighting(SampleWeighting):
    r"""The paper's weight with the teacher's most likely class in place of the label, for labels that may be wrong
    (like PaddleClas' WSLLoss with ``use_target_as_gt``).

    Examples:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> LabelFreeWSLWeighting()(SampleBatch(student, teacher, torch.tensor([1])))  # as if the label were 0
        tensor([0.9101])
    """

    def forward(self, batch: SampleBatch) -> Tensor:
        r"""Return weights in [0, 1]. Shape: (N, \*)."""
        target = batch.teachers_target()
        return functional.weight_of_losses(
            batch.hard_loss(batch.preds_S, target), batch.hard_loss(batch.preds_T, target)
        )
