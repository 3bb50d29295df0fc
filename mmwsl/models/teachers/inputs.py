"""What makes a network a teacher: its mode and its kind of input."""
from __future__ import annotations

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze(teacher: nn.Module, norm_eval: bool) -> None:
    """Take a teacher's gradients away for good, and with norm_eval=False its running statistics too.

    BatchNorm then predicts with the statistics of each batch while it trains, and the running ones stay as loaded.
    """
    teacher.requires_grad_(False)
    teacher.eval()  # not chained: the train() of some networks returns None
    for module in teacher.modules():
        if isinstance(module, _BatchNorm) and not norm_eval:
            module.track_running_stats = False


def set_teacher_mode(teacher: nn.Module, use_batch_statistics: bool) -> None:
    """Eval mode throughout, dropout and drop-path included; on demand without BatchNorm."""
    teacher.eval()
    if use_batch_statistics:
        for module in teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train()


def share_inputs(teacher: BaseModel, data_preprocessor: nn.Module, normalises: bool = False) -> None:
    """Let a teacher with other normalisation or channel order read what was prepared for the student.

    One affine map turns the student's input into the teacher's, so both see the same crop and the same mixture.

    Args:
        teacher: The network; its preprocessor becomes the student's.
        data_preprocessor: The student's.
        normalises: Whether the teacher's preprocessor counts even without mean and std: it then wants raw pixels.
            Otherwise such a teacher takes the student's input as it is.

    Raises:
        ValueError: If only the teacher's preprocessor normalises, if the two differ in their number of channels, or if
            the student's pads, which no map of pixels can undo.
    """
    own, teacher.data_preprocessor = teacher.data_preprocessor, data_preprocessor
    student = _normalisation(data_preprocessor)
    if getattr(own, 'mean', None) is None:
        if not normalises:
            return
        if student is None:
            if _swaps(own) != _swaps(data_preprocessor):
                teacher.register_forward_pre_hook(_InputAdapter(torch.ones(1), torch.zeros(1), True), with_kwargs=True)
            return
        own.mean, own.std = torch.zeros_like(student[0]), torch.ones_like(student[1])
    if student is None:
        raise ValueError('the teacher comes with a data_preprocessor that normalises and the student with one that '
                         'does not: give the student mean and std too (mean 0 and std 1 change nothing)')
    mean, std, to_rgb = student
    own_mean, own_std, own_to_rgb = _normalisation(own)  # type: ignore[misc]
    if own_mean.shape != mean.shape:
        raise ValueError(f"the teacher's data_preprocessor is for {len(own_mean)} channels and the student's for "
                         f'{len(mean)}')
    flip = own_to_rgb != to_rgb and len(mean) == 3
    if flip:  # the student's statistics, in the teacher's channel order
        mean, std = mean.flip(0), std.flip(0)
    if not flip and torch.equal(own_mean, mean) and torch.equal(own_std, std):
        return
    if getattr(data_preprocessor, 'pad_size_divisor', 1) > 1:
        raise ValueError("the teacher's data_preprocessor normalises otherwise than the student's, which also pads "
                         f'(pad_size_divisor={data_preprocessor.pad_size_divisor}): pad in the pipeline instead')
    scale, shift = std / own_std, (mean - own_mean) / own_std
    teacher.register_forward_pre_hook(_InputAdapter(scale, shift, flip), with_kwargs=True)


def _normalisation(preprocessor: nn.Module) -> tuple[Tensor, Tensor, bool] | None:
    """Mean, std and whether channels are swapped, of mmpretrain's and of mmengine's preprocessors."""
    if getattr(preprocessor, 'mean', None) is None:
        return None
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device='cpu')
                 for value in (preprocessor.mean, preprocessor.std))
    return mean, std, _swaps(preprocessor)


def _swaps(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, 'to_rgb', False) or getattr(preprocessor, '_channel_conversion', False))


class _InputAdapter:
    """Forward pre-hook: the student's normalised input, as the teacher's own preprocessor would have made it."""

    def __init__(self, scale: Tensor, shift: Tensor, flip: bool) -> None:
        self.scale, self.shift, self.flip = scale, shift, flip

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self.adapt(args[0]), *args[1:]), kwargs
        return args, {**kwargs, 'inputs': self.adapt(kwargs['inputs'])}

    def adapt(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flip(1) if self.flip and inputs.shape[1] == 3 else inputs
        self.scale, self.shift = self.scale.to(inputs.device), self.shift.to(inputs.device)  # a copy, once
        return inputs * self.scale.to(inputs) + self.shift.to(inputs)
