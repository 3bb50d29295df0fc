"""Check that no setting is lost when the algorithm's data_preprocessor replaces the student's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_settings(architecture: Any, student: Any, shared: Any) -> None:
    """Raise ValueError if the student's data_preprocessor differs from the algorithm's, which replaces it.

    Args:
        architecture: Config of the student; a built student has none to compare.
        student: The student.
        shared: The algorithm's data_preprocessor.
    """
    own = getattr(student, 'data_preprocessor', None)
    named = (architecture.get('data_preprocessor') if isinstance(architecture, dict) else None) or {}
    attributes = {
        key: '_channel_conversion' if key in ('bgr_to_rgb', 'rgb_to_bgr') else key
        for key in named
        if key not in ('type', 'num_classes', 'to_onehot', 'batch_augments')
    }
    differ = [
        key
        for key, attribute in attributes.items()
        if not _same(getattr(own, attribute, None), getattr(shared, attribute, None))
    ]
    mixing = [_mixing(preprocessor) for preprocessor in (own, shared)]
    if all(mixing) and mixing[0] != mixing[1]:
        differ.append('batch_augments (train_cfg)')
    if differ:
        raise ValueError(
            f'model.architecture sets {", ".join(differ)} of its data_preprocessor, which is not used: '
            "the config's data_preprocessor prepares the images, and has different values. Set them there, "
            'and delete them from model.architecture'
        )


def keep_batch_augments(student: Any, shared: Any) -> None:
    """Move the student's ``batch_augments`` to the algorithm's data_preprocessor, unless that has its own.

    Args:
        student: The student.
        shared: The algorithm's data_preprocessor, changed in place.

    Raises:
        ValueError: If the algorithm's data_preprocessor cannot mix images.
    """
    own: Any = getattr(student, 'data_preprocessor', None)
    augments = getattr(own, 'batch_augments', None)
    if augments is None or getattr(shared, 'batch_augments', None) is not None:
        return
    if not hasattr(shared, 'batch_augments'):
        raise ValueError(
            "the student's train_cfg mixes images, which the algorithm's data_preprocessor, a "
            f'{type(shared).__name__}, cannot do: use mmpretrain.ClsDataPreprocessor'
        )
    shared.batch_augments = augments
    if hasattr(shared, 'to_onehot'):  # mmpretrain's augments also mix labels
        shared.to_onehot, shared.num_classes = True, shared.num_classes or own.num_classes


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def _mixing(preprocessor: Any) -> Any:
    """Settings of the batch augments, in a form that can be compared; None if there are none."""
    augments = getattr(preprocessor, 'batch_augments', None)
    return augments and (  # mmdet's are a list
        [(type(part).__name__, getattr(part, '__dict__', None)) for part in getattr(augments, 'augments', augments)],
        getattr(augments, 'probs', None),
    )
