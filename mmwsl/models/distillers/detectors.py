"""Where mmdet's dense detectors keep what a logit loss needs, and which detectors have nothing to compare."""

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
"""Heads that hand the class scores of all anchors to ``loss_cls``, in the order in which ``forward`` outputs them."""
_POSITIVES = 'it trains class scores on positives alone, and has another output for whether there is an object'
_QUERIES = 'its queries are matched to boxes, and a query of the teacher is matched to another box'
_OWN_WEIGHTS = 'it chooses or weights its positives by its own losses, so not each anchor has a target'
_OPERATORS = "it needs mmcv's deformable convolution, and was not tried"
_POINTS = 'it predicts heat maps of points, and no class scores of anchors'
_NOT_COMPARABLE = {  # by the class or a base class of a head
    'YOLOXHead': _POSITIVES,
    'YOLOV3Head': _POSITIVES,
    'SSDHead': 'its cross-entropy is a function over the negatives that it mines, and no module',
    'YOLACTHead': 'its cross-entropy is over the negatives that it mines',
    'DETRHead': _QUERIES,
    'EmbeddingRPNHead': _QUERIES,
    'PAAHead': _OWN_WEIGHTS,
    'FreeAnchorRetinaHead': _OWN_WEIGHTS,
    'FSAFHead': _OWN_WEIGHTS,
    'AutoAssignHead': _OWN_WEIGHTS,
    'PISARetinaHead': _OWN_WEIGHTS,
    'TOODHead': 'its class scores are probabilities, the products of two',
    'VFNetHead': _OPERATORS,
    'RepPointsHead': _OPERATORS,
    'DDODHead': _OPERATORS,
    'NASFCOSHead': _OPERATORS,
    'FoveaHead': _OPERATORS,
    'GuidedAnchorHead': _OPERATORS,
    'CornerHead': _POINTS,
    'CenterNetHead': _POINTS,
    'CenterNetUpdateHead': _POINTS,
    'ATSSVLFusionHead': 'it compares boxes with a text, and has no classes of its own',
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
"""What a detector is distilled by unless a config says otherwise, for heads of sigmoids (True) and of a softmax."""


@TASK_UTILS.register_module()
class NamedInputsRecorder(ModuleOutputsRecorder):
    """Records what a module is given, each time it is called: a dict with the names of its ``forward``'s arguments.

    MMRazor's ModuleInputs leaves out what is given by keyword.
    """

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Hook into the module of this name, or raise AssertionError."""
        module = dict(model.named_modules()).get(self.source) if model is not None else None
        assert module is not None, f'"{self.source}" is not in the model.'
        module.register_forward_hook(self.forward_hook, with_kwargs=True)

    def forward_hook(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Keep the arguments."""
        if self.recording:
            self.data_buffer.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


class Detector(NamedTuple):
    """What is known of a dense head."""

    head: str
    loss: str
    """The module that is given its class scores, targets and the weights of these."""
    arguments: tuple[str, ...]
    """What it calls the three."""
    classes: int
    is_sigmoid: bool
    """Whether each class is decided by itself; else one of all and background."""
    strides: list[int]
    """Of its levels, in pixels."""
    anchors: list[str]
    """In words that are equal for equal anchors, one after the other."""

    @property
    def scores(self) -> int:
        """How many an anchor has."""
        return self.classes if self.is_sigmoid else self.classes + 1

    def match(self, calls: Sequence[Mapping[str, Any]], output: Any) -> dict[str, Any]:
        """Bring the teacher's class scores into the order of the student's, without the anchors that do not count.

        Args:
            calls: What the student's loss was given: once per level, or once for all of them.
            output: The teacher's, first its class scores of each level. Shape: (N, A * C, h, w) each.

        Returns:
            ``preds_S``, ``preds_T``. Shape: (M, C) each. ``gt_labels``: class indices, of which C is background, or
            (class indices, quality). Shape: (M, ) each. ``avg_factor``: the number of positives, the mean of all
            processes.

        Raises:
            ValueError: If the two networks have other levels.
        """
        given: list[list[Any]] = [[call.get(name) for name in self.arguments] for call in calls]
        rows = [level.permute(0, 2, 3, 1).reshape(-1, self.scores) for level in _levels(output)]
        rows = [torch.cat(rows)] if len(given) == 1 else rows
        shapes_S, shapes_T = [list(call[0].shape) for call in given], [list(level.shape) for level in rows]
        if shapes_S != shapes_T:
            raise ValueError(
                f"the student's loss was given class scores of shape {shapes_S}, level by level, and the "
                f"teacher's are of shape {shapes_T}: give both networks the same levels (neck.num_outs) "
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
    """The class scores in what a teacher outputs.

    Raises:
        ValueError: If there are none.
    """
    levels = output[0] if isinstance(output, Sequence) and output else None
    if not isinstance(levels, Sequence):
        raise ValueError(
            'the teacher should output what a dense head of mmdet does, a tuple whose first part has the '
            f'class scores of each level, got {type(output).__name__}'
        )
    return list(levels)


def _kept(scores: Tensor, level: Tensor, target: Any, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Scores of both networks, labels and, if there is one, the quality; where the labels have a weight."""
    parts = (scores, level, *(target if isinstance(target, tuple) else (target,)))
    if weight is None:
        return parts
    kept = weight > 0
    return tuple(part[kept] for part in parts)


def is_detector(network: nn.Module) -> bool:
    """Whether a network is built like one of mmdet's detectors."""
    return any(hasattr(network, name) for name in ('bbox_head', 'rpn_head', 'roi_head'))


def detector(network: nn.Module, who: str = 'student') -> Detector:
    """Find what a logit loss needs in a detector.

    Raises:
        ValueError: If its head has no such scores.
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
    """Whether a head decides about each class by itself."""
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
    """Raise ValueError unless a detector has one head, whose class scores are those that its loss is given."""
    head = getattr(network, 'bbox_head', None)
    if head is None:
        raise ValueError(
            f'the {who}, a {type(network).__name__}, has two stages, and each network scores its own '
            'proposals. docs/dense.md has a config in which they share them; or take a dense detector, '
            'such as GFL, ATSS or RetinaNet'
        )
    bases = [base.__name__ for base in type(head).__mro__]
    known = next((base for base in bases if base in _NOT_COMPARABLE or base in HEADS), '')
    reason = _NOT_COMPARABLE.get(known)
    if not known:
        reason = f'none of {", ".join(HEADS)} is a base class of it'
    elif not reason and getattr(head.loss_cls, 'activated', False):
        reason = 'its class scores are probabilities (activated=True)'
    if reason:
        raise ValueError(
            f'the {who} has a {type(head).__name__}, and {reason}: soft labels need logits of all classes '
            'at each anchor. Take another bbox_head, such as GFLHead, ATSSHead or RetinaHead'
        )


def check_alike(student: Detector, network: nn.Module) -> None:
    """Raise ValueError for a teacher that is a detector whose scores are of other classes or anchors."""
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
