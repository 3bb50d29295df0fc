"""Locate the class scores and targets of mmdet's dense detectors, and refuse detectors that cannot be compared."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmrazor.models.task_modules.recorder import ModuleOutputsRecorder
from torch import Tensor, nn

from mmwsl.models.losses import over_processes
from mmwsl.registry import TASK_UTILS

HEADS = ('RetinaHead', 'RetinaSepBNHead', 'GFLHead', 'FCOSHead', 'ATSSHead', 'RTMDetHead', 'YOLOFHead')
"""Heads that pass the class scores of all anchors to ``loss_cls``, in the order in which ``forward`` outputs them."""
_POSITIVES = 'it trains class scores on positives alone, and has another output for whether there is an object'
_QUERIES = 'its queries are matched to boxes, and the same query of the teacher may be matched to another box'
_OWN_WEIGHTS = 'it chooses or weights its positives by its own losses, so not every anchor has a target'
_OPERATORS = "it needs mmcv's deformable convolution, and was not tried"
_POINTS = 'it predicts heat maps of points, not class scores of anchors'
_NOT_COMPARABLE = {  # by the class or a base class of a head
    'YOLOXHead': _POSITIVES,
    'YOLOV3Head': _POSITIVES,
    'SSDHead': 'its cross-entropy is a function over the negatives that it mines, not a module',
    'YOLACTHead': 'its cross-entropy is taken over the negatives that it mines',
    'DETRHead': _QUERIES,
    'EmbeddingRPNHead': _QUERIES,
    'PAAHead': _OWN_WEIGHTS,
    'FreeAnchorRetinaHead': _OWN_WEIGHTS,
    'FSAFHead': _OWN_WEIGHTS,
    'AutoAssignHead': _OWN_WEIGHTS,
    'PISARetinaHead': _OWN_WEIGHTS,
    'TOODHead': 'its class scores are products of two probabilities',
    'VFNetHead': _OPERATORS,
    'RepPointsHead': _OPERATORS,
    'DDODHead': _OPERATORS,
    'NASFCOSHead': _OPERATORS,
    'FoveaHead': _OPERATORS,
    'GuidedAnchorHead': _OPERATORS,
    'CornerHead': _POINTS,
    'CenterNetHead': _POINTS,
    'CenterNetUpdateHead': _POINTS,
    'ATSSVLFusionHead': 'it compares boxes with text, and has no classes of its own',
    'LDHead': "it is distilled by mmdet's KnowledgeDistillationSingleStageDetector",
}
LOSSES: dict[bool, dict[str, Any]] = {
    True: dict(
        type='mmwsl.WeightedLoss',
        loss=dict(type='BernoulliKD', tau=1.0),
        weighting=dict(
            type='ProductWeighting', factors=[dict(type='WSLWeighting'), dict(type='DisagreementWeighting')]
        ),
    ),
    False: dict(type='mmwsl.WSLLoss', tau=1.0, loss_weight=1.0),
}
"""Default distillation loss of detectors, for sigmoid heads (True) and softmax heads (False)."""


@TASK_UTILS.register_module()
class NamedInputsRecorder(ModuleOutputsRecorder):
    """Record the arguments of a module at each call, as a dict by the names in its ``forward``.

    MMRazor's ModuleInputs leaves out keyword arguments.
    """

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Hook into the module that ``source`` names, or raise AssertionError."""
        module = dict(model.named_modules()).get(self.source) if model is not None else None
        assert module is not None, f'"{self.source}" is not in the model.'
        module.register_forward_hook(self.forward_hook, with_kwargs=True)

    def forward_hook(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Store the arguments."""
        if self.recording:
            self.data_buffer.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


class Detector(NamedTuple):
    """What a logit loss has to know about a dense head."""

    head: str
    loss: str
    """Name of the module that receives its class scores, their targets and the targets' weights."""
    arguments: tuple[str, ...]
    """That module's names for these three arguments."""
    classes: int
    is_sigmoid: bool
    """Whether each class has a sigmoid of its own; otherwise all classes and background share a softmax."""
    strides: list[int]
    """Strides of its levels, in pixels."""
    anchors: list[str]
    """A description of each anchor, which is equal for equal anchors."""

    @property
    def scores(self) -> int:
        """Number of class scores of an anchor."""
        return self.classes if self.is_sigmoid else self.classes + 1

    def match(self, calls: Sequence[Mapping[str, Any]], output: Any) -> dict[str, Any]:
        """Bring the teacher's class scores into the student's order, and drop the anchors that do not count.

        Args:
            calls: Arguments of the student's loss: of one call per level, or of a single call for all levels.
            output: Output of the teacher, which begins with the class scores of each level. Shape: (N, A * C, h, w)
                each.

        Returns:
            ``preds_S`` and ``preds_T``. Shape: (M, C) each. ``gt_labels``: class indices, with C for background, or
            (class indices, quality). Shape: (M, ) each. ``avg_factor``: the number of positives, averaged over
            processes.

        Raises:
            ValueError: If the two networks have different levels.
        """
        given: list[list[Any]] = [[call.get(name) for name in self.arguments] for call in calls]
        rows = [level.permute(0, 2, 3, 1).reshape(-1, self.scores) for level in _levels(output)]
        rows = [torch.cat(rows)] if len(given) == 1 else rows
        shapes_S, shapes_T = [list(call[0].shape) for call in given], [list(level.shape) for level in rows]
        if shapes_S != shapes_T:
            raise ValueError(
                f'the student has class scores of shape {shapes_S}, level by level, and the '
                f'teacher of shape {shapes_T}: give both networks the same levels (neck.num_outs) '
                'and anchors (bbox_head.anchor_generator)'
            )
        parts = [_kept(call[0], level, *call[1:]) for call, level in zip(given, rows, strict=True)]
        preds_S, preds_T, labels, *quality = (torch.cat(part) for part in zip(*parts, strict=True))
        positives = ((labels >= 0) & (labels < self.classes)).sum()
        return dict(
            preds_S=preds_S,
            preds_T=preds_T,
            gt_labels=(labels, *quality) if quality else labels,
            avg_factor=over_processes(positives),
        )


def _levels(output: Any) -> list[Tensor]:
    """Class scores of each level in a teacher's output.

    Raises:
        ValueError: If there are none.
    """
    levels = output[0] if isinstance(output, Sequence) and output else None
    if not isinstance(levels, Sequence):
        raise ValueError(
            'the teacher should output what a dense head of mmdet does, a tuple that begins with the '
            f'class scores of each level, got {type(output).__name__}. Use a detector of mmdet as teacher'
        )
    return list(levels)


def _kept(scores: Tensor, level: Tensor, target: Any, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Scores of both networks, labels and, if there is one, the quality, of the anchors whose weight is above 0."""
    parts = (scores, level, *(target if isinstance(target, tuple) else (target,)))
    if weight is None:
        return parts
    kept = weight > 0
    return tuple(part[kept] for part in parts)


def is_detector(network: nn.Module) -> bool:
    """Whether a network is built like one of mmdet's detectors."""
    return any(hasattr(network, name) for name in ('bbox_head', 'rpn_head', 'roi_head'))


def detector(network: nn.Module, who: str = 'student') -> Detector:
    """Locate the class scores and targets of a detector.

    Args:
        network: The detector.
        who: 'student' or 'teacher', for messages.

    Raises:
        ValueError: If its head has no class scores that can be compared.
    """
    check_head(who, network)
    head: Any = network.bbox_head
    strides = [max(stride) for stride in head.prior_generator.strides]
    return Detector(
        type(head).__name__,
        'bbox_head.loss_cls',
        tuple(inspect.signature(head.loss_cls.forward).parameters)[:3],
        head.num_classes,
        is_sigmoid(head),
        strides,
        _anchors(head.prior_generator, strides),
    )


def is_sigmoid(head: Any) -> bool:
    """Whether a head has a sigmoid for each class."""
    return getattr(head, 'cls_out_channels', head.num_classes) == head.num_classes


def _anchors(generator: Any, strides: list[int]) -> list[str]:
    base = getattr(generator, 'base_anchors', None)
    if base is None:
        return [f'points at {generator.offset} of a stride']
    return [
        f'the anchor {[round(edge, 2) for edge in anchor]} at the stride {stride}'
        for stride, level in zip(strides, base, strict=True)
        for anchor in level.tolist()
    ]


def check_head(who: str, network: Any) -> None:
    """Raise ValueError unless a detector has one dense head, which passes its class scores to its loss unchanged."""
    head = getattr(network, 'bbox_head', None)
    if head is None:
        raise ValueError(
            f'the {who}, a {type(network).__name__}, has two stages, and each network scores its own '
            'proposals. docs/dense.md has a config in which they share proposals; or use a dense detector, '
            'such as GFL, ATSS or RetinaNet'
        )
    bases = [base.__name__ for base in type(head).__mro__]
    known = next((base for base in bases if base in _NOT_COMPARABLE or base in HEADS), '')
    reason = _NOT_COMPARABLE.get(known)
    if not known:
        reason = f'it is derived from none of {", ".join(HEADS)}'
    elif not reason and getattr(head.loss_cls, 'activated', False):
        reason = 'its class scores are probabilities (activated=True)'
    if reason:
        raise ValueError(
            f'the {who} has a {type(head).__name__}, and {reason}: soft labels need logits of all classes '
            'at each anchor. Use another bbox_head, such as GFLHead, ATSSHead or RetinaHead'
        )


def check_alike(student: Detector, network: nn.Module) -> None:
    """Raise ValueError if the teacher is a detector with other classes or anchors than the student."""
    if not is_detector(network):
        return
    teacher, key = detector(network, 'teacher'), 'bbox_head.anchor_generator'
    pairs = zip(teacher.anchors, student.anchors, strict=False)
    kind_T, kind_S = ('sigmoids' if found.is_sigmoid else 'a softmax' for found in (teacher, student))
    differing = next((pair for pair in pairs if pair[0] != pair[1]), ('', ''))
    facts: list[tuple[str, str, Any, Any]] = [
        ('predicts {} classes', 'bbox_head.num_classes', teacher.classes, student.classes),
        ('has {}', 'use_sigmoid of bbox_head.loss_cls', kind_T, kind_S),
        ('has the strides {}', f'strides (of {key}, or bbox_head.strides)', teacher.strides, student.strides),
        ('has {} anchors', key, len(teacher.anchors), len(student.anchors)),
        ('has {}', key, *differing),
    ]
    for words, key, theirs, own in facts:
        if theirs != own:
            raise ValueError(
                f'the teacher ({teacher.head}) {words.format(theirs)}, and the student ({student.head}) '
                f'{words.format(own)}: scores are compared anchor by anchor. Give both the same {key}'
            )
