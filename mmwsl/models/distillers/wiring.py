"""Locate the logits and targets of classifiers for a logit loss, and refuse heads that have none."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from mmpretrain.models.heads import (
    ClsHead,
    ConformerHead,
    EfficientFormerClsHead,
    MultiLabelClsHead,
    MultiTaskHead,
)
from torch import nn

from mmwsl.models.distillers.detectors import is_detector, is_sigmoid
from mmwsl.models.distillers.segmentors import is_segmentor, last_head, teacher_source
from mmwsl.models.losses import WeightedLoss

HARD_LOSS, LOGITS, SAMPLES = 'hard_loss', 'logits', 'samples'
LOW = 'low_logits'  # a segmentor's, before they are resized to the labels
# MMRazor's mapping for each argument of a logit loss: the recorder that holds it.
MAPPINGS: dict[str, dict] = {
    'preds_S': dict(recorder=HARD_LOSS, from_student=True, data_idx=0),
    'preds_T': dict(recorder=LOGITS, from_student=False),
    'gt_labels': dict(recorder=HARD_LOSS, from_student=True, data_idx=1),
    'teacher_hard_loss': dict(recorder='teacher_hard_loss', from_student=False),  # of a teacher cache that is not exact
    'data_samples': dict(recorder=SAMPLES, from_student=True, data_idx=1),
}
# Other names in the field for the same arguments.
_SYNONYMS = {
    'logits_S': 'preds_S',
    'student': 'preds_S',
    'logits_student': 'preds_S',
    'student_logits': 'preds_S',
    'logits_T': 'preds_T',
    'teacher': 'preds_T',
    'logits_teacher': 'preds_T',
    'teacher_logits': 'preds_T',
    'target': 'gt_labels',
    'targets': 'gt_labels',
    'label': 'gt_labels',
    'labels': 'gt_labels',
    'gt_label': 'gt_labels',
}
_NOT_COMPARABLE: dict[type, str] = {
    ConformerHead: 'it has two classifiers, whose logits it adds only in a test',
    EfficientFormerClsHead: 'it has two classifiers, whose logits it averages only in a test',
    MultiTaskHead: 'it has a head for each task, and leaves samples out',
}


def student_recorder(student: nn.Module) -> dict:
    """Return the config of a recorder for the logits and targets that a student passes to its own loss.

    Raises:
        ValueError: If its head passes other values to the loss than it predicts without a target.
    """
    head = getattr(student, 'head', None)
    if head is None and hasattr(student, 'loss_module'):  # TimmClassifier, HuggingFaceClassifier
        return dict(type='mmrazor.ModuleInputs', source='loss_module')
    reason = next((why for kind, why in _NOT_COMPARABLE.items() if isinstance(head, kind)), None)
    if reason is None and head is not None and 'target' in inspect.signature(head.forward).parameters:
        reason = "it moves the true class's logit by a margin in training"
    if reason:
        raise ValueError(
            f'the student has a {type(head).__name__}, and {reason}: its loss is not computed from its '
            "predictions. Use another head, such as LinearClsHead, or record the student's logits yourself: "
            f'student_recorders=dict({HARD_LOSS}=...) in model.distiller'
        )
    return dict(type='mmrazor.ModuleInputs', source='head.loss_module')


def teacher_recorder(teacher: nn.Module) -> dict:
    """Return the config of a recorder for a teacher's logits.

    Raises:
        ValueError: If a segmentor's head has none.
    """
    if is_detector(teacher):  # its class scores alone: no targets, losses or boxes are computed
        return dict(type='mmrazor.ModuleOutputs', source='')
    if is_segmentor(teacher):
        return dict(type='mmrazor.ModuleOutputs', source=teacher_source(teacher))
    return dict(type='mmrazor.ModuleOutputs', source='head' if hasattr(teacher, 'head') else '')


def mappings_for(name: str, loss: Any, recorders: Iterable[str], given: dict[str, dict]) -> dict[str, dict]:
    """Return MMRazor's mapping of each argument of a loss to a recorder.

    Args:
        name: Name of the loss.
        loss: The module.
        recorders: Names of the recorders.
        given: Mappings in the config, which replace all others.

    Raises:
        ValueError: If a required argument has no recorder.
    """
    if given:
        return given
    mappings: dict[str, dict] = {}
    for argument, parameter in inspect.signature(loss.forward).parameters.items():
        mapping = MAPPINGS.get(_SYNONYMS.get(argument, argument))
        if mapping and mapping['recorder'] in recorders:
            mappings[argument] = mapping
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(
                f'{name}: nothing is recorded for the argument {argument!r} of {type(loss).__name__}. '
                f'Add {name}=dict({argument}=dict(recorder=..., from_student=...), ...) to '
                'loss_forward_mappings of model.distiller, with these recorders'
            )
    return mappings


def check_targets(name: str, loss: WeightedLoss, student: nn.Module, data_preprocessor: Any) -> None:
    """Raise ValueError if a loss is not defined for the student's head, or for labels that are mixed."""
    if is_segmentor(student):
        _check_segmentor(name, loss, last_head(student)[1])
        return
    if is_detector(student):
        _check_detector(name, loss, getattr(student, 'bbox_head', None))
        return
    head = getattr(student, 'head', None)
    several = isinstance(head, MultiLabelClsHead)
    # one label by a binary cross-entropy, as "ResNet strikes back" trains, takes either
    either = getattr(getattr(head, 'loss_module', None), 'use_sigmoid', False)
    if (several and not loss.sample_loss.for_sigmoids) or (
        isinstance(head, ClsHead) and not either and loss.sample_loss.for_sigmoids
    ):
        kind, other = ('sigmoid', 'BernoulliKD') if several else ('softmax', 'SoftCrossEntropy')
        raise ValueError(
            f"{name}: {type(loss.sample_loss).__name__} is not defined for the student's "
            f'{type(head).__name__}, a {kind} head. Use mmwsl.WeightedLoss with '
            f"loss=dict(type='{other}') in model.distiller.distill_losses"
        )
    needy = [part for part in (loss.sample_loss, loss.sample_weighting) if part.needs_classes]
    if getattr(data_preprocessor, 'batch_augments', None) is not None and needy:
        raise ValueError(
            f'{name}: {type(needy[0]).__name__} needs one class for each image, and batch_augments mixes '
            'images and labels (mixup, cutmix). Remove batch_augments, or use a loss and a weighting '
            'that are defined for class scores'
        )


def _check_segmentor(name: str, loss: WeightedLoss, head: Any) -> None:
    losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    if loss.sample_loss.for_sigmoids and not any(getattr(part, 'use_sigmoid', False) for part in losses):
        raise ValueError(
            f"{name}: {type(loss.sample_loss).__name__} is not defined for the student's "
            f'{type(head).__name__}, whose classes exclude each other. Use mmwsl.WSLLoss, or another '
            'loss for a softmax'
        )
    _check_weighting(name, loss, 'a segmentor has targets at each pixel')


def _check_detector(name: str, loss: WeightedLoss, head: Any) -> None:
    """Check a dense head; one with two stages is wired by a config, and has a softmax."""
    sigmoid = head is not None and is_sigmoid(head)
    if loss.sample_loss.for_sigmoids != sigmoid:
        kind = f'{type(head).__name__}, a {"sigmoid" if sigmoid else "softmax"} head' if head else 'second stage'
        instead = "mmwsl.WeightedLoss with loss=dict(type='BernoulliKD')" if sigmoid else 'mmwsl.WSLLoss'
        raise ValueError(
            f"{name}: {type(loss.sample_loss).__name__} is not defined for the student's {kind}. Use "
            f'{instead} in model.distiller.distill_losses'
        )
    _check_weighting(name, loss, 'a detector has targets at each anchor')


def _check_weighting(name: str, loss: WeightedLoss, why: str) -> None:
    if loss.sample_weighting.per_image:
        raise ValueError(
            f"{name}: teacher_losses has one value per image, and {why}: compute the weight from the teacher's "
            'logits (without teacher_losses)'
        )
