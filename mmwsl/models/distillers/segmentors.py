"""Locate the logits and labels of mmseg's segmentors for a logit loss, and refuse heads without logits of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTIONS = ('label', 'logits')
_NO_PIXELS = 'it predicts masks with a class each, not class scores of pixels'
_NOT_COMPARABLE = {  # by the class or a base class of a head
    'MaskFormerHead': _NO_PIXELS,
    'Mask2FormerHead': _NO_PIXELS,
    'SideAdapterCLIPHead': _NO_PIXELS,
    'PointHead': 'it is trained on a few points of an image, and the teacher answers for all pixels',
    'SegmenterMaskTransformerHead': 'its class scores are products with tokens, normalised once more for masks',
    'VPDDepthHead': 'it predicts depths, not classes',
    'STDCHead': 'it predicts edges',
    'IterativeDecodeHead': 'each of its stages hands its own class scores to one loss',
}
_LOSSES = {'PIDHead': 1}
"""Which of a head's losses is given the class scores that it predicts with, if that is not the first."""


class Segmentor(NamedTuple):
    """What a logit loss has to know about a student's decode head."""

    loss: str
    """Name of the module that receives its logits, at the labels' resolution, and the labels."""
    logits: str
    """Name of the module that outputs its logits, at their own resolution."""
    classes: int
    align_corners: bool
    ignore_index: int
    resolution: str
    """Resolution at which the two networks are compared, one of ``RESOLUTIONS``."""

    def match(self, preds_S: Tensor, preds_T: Tensor | tuple, gt_labels: Tensor) -> dict[str, Tensor]:
        r"""Resize the teacher's logits and the labels to the resolution of the student's logits.

        Args:
            preds_S: Student logits. Shape: (N, C, H, W).
            preds_T: Teacher logits, (N, C, h, w), or a tuple that begins with them (DAHead, EncHead).
            gt_labels: Class of each pixel. Shape: (N, H', W').

        Returns:
            The three arguments at one resolution, by name.
        """
        size = preds_S.shape[2:]
        preds_T = preds_T[0] if isinstance(preds_T, tuple) else preds_T
        if preds_T.shape[2:] != size:
            preds_T = F.interpolate(preds_T, size, mode='bilinear', align_corners=self.align_corners)
        if gt_labels.shape[1:] != size:  # float32 holds every class exactly, and 255
            gt_labels = F.interpolate(gt_labels.unsqueeze(1).float(), size, mode='nearest').squeeze(1).long()
        return dict(preds_S=preds_S, preds_T=preds_T, gt_labels=gt_labels)


def is_segmentor(network: nn.Module) -> bool:
    """Whether a network is built like mmseg's EncoderDecoder."""
    return hasattr(network, 'decode_head')


def last_head(network: nn.Module) -> tuple[str, Any]:
    """Return the name and module of the decode head that predicts: the last one of a cascade."""
    head: Any = network.decode_head
    if isinstance(head, nn.ModuleList | Sequence):
        return f'decode_head.{len(head) - 1}', head[-1]
    return 'decode_head', head


def segmentor(network: nn.Module, resolution: str) -> Segmentor:
    """Locate the logits and labels of a student.

    Args:
        network: The student.
        resolution: 'label' compares at the labels' resolution, as the student's own loss does; 'logits' at that of the
            student's logits, which takes a fraction of the memory (1/64 if their side is an eighth).

    Raises:
        ValueError: If the head has no logits of pixels.
    """
    name, head = last_head(network)
    check_head('student', head)
    which = f'.{_LOSSES.get(type(head).__name__, 0)}' if isinstance(head.loss_decode, nn.ModuleList) else ''
    return Segmentor(
        f'{name}.loss_decode{which}',
        f'{name}.conv_seg',
        head.num_classes,
        bool(head.align_corners),
        head.ignore_index,
        resolution,
    )


def check_classes(student: Segmentor, teacher: nn.Module) -> None:
    """Raise ValueError if the teacher is a segmentor with another number of classes."""
    found = last_head(teacher)[1].num_classes if is_segmentor(teacher) else student.classes
    if found != student.classes:
        raise ValueError(
            f'the teacher predicts {found} classes and the student {student.classes}: set num_classes of '
            'the decode heads to the same number'
        )


def teacher_source(network: nn.Module) -> str:
    """Return the name of the module that outputs a teacher's logits; '' is the network itself.

    Raises:
        ValueError: If its head has no logits of pixels.
    """
    name, head = last_head(network)
    check_head('teacher', head)
    return '' if name == 'decode_head' else f'{name}.conv_seg'  # a cascade has no forward of its own


def check_head(who: str, head: Any) -> None:
    """Raise ValueError unless a head's ``conv_seg`` outputs logits with a channel for each class."""
    bases = [base.__name__ for base in type(head).__mro__]
    reason = next((why for name, why in _NOT_COMPARABLE.items() if name in bases), None)
    if reason is None and not (hasattr(head, 'conv_seg') and hasattr(head, 'loss_decode')):
        reason = 'it has no conv_seg that outputs class scores'
    if reason is None and head.out_channels != head.num_classes:
        reason = f'it has {head.out_channels} output channel(s) for {head.num_classes} classes'
    if reason:
        raise ValueError(
            f'the {who} has a {type(head).__name__}, and {reason}: soft labels need scores of '
            'all classes at each pixel. Use another decode_head, such as FCNHead, PSPHead or ASPPHead'
        )
