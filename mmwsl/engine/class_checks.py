"""Check that data, student, teacher and metrics of a run have the same classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.runner import Runner
from mmpretrain.evaluation import Accuracy

from mmwsl.utils.checkpoint import read_classes


def check_classes(runner: Runner, predicted: int | None) -> None:
    """Raise ValueError if training data, validation data and student do not have the same classes."""
    loops = [loop for loop in (runner.train_loop, runner.val_loop) if loop is not None]
    names = [tuple(getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes') or ()) for loop in loops]
    if len(set(filter(None, names))) > 1 and set(names[0]) == set(names[1]) and len(names[0]) == len(names[1]):
        place = next(place for place, pair in enumerate(zip(*names, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            'training and validation data have the same classes in another order, so a label means '
            f'another class in each: class {place} is {names[0][place]!r} in training and '
            f'{names[1][place]!r} in validation. Give both the same order (metainfo=dict(classes=...))'
        )
    if len(set(filter(None, names))) > 1:
        raise ValueError(
            'training and validation data have different classes, so a label means another class in each; '
            f'only in training: {sorted(set(names[0]) - set(names[1]))}, only in validation: '
            f'{sorted(set(names[1]) - set(names[0]))}. Give both the same class '
            'folders, an empty one for a class without images'
        )
    found = len(max(names))
    if not found or not predicted or found == predicted:
        return
    message = (
        f'the data have {found} classes and the student predicts {predicted}: set num_classes of the heads (and '
        'of data_preprocessor) to the same number'
    )
    if found > predicted:
        raise ValueError(message)
    runner.logger.warning(f'{message}, unless the others are meant to stay unused.')


def check_order_of_classes(runner: Runner) -> None:
    """Raise ValueError if the teacher's file names the classes of the data in another order."""
    path = (runner.cfg.get('model') or {}).get('teacher_ckpt')
    teachers = read_classes(path) if path and Path(path).is_file() else ()
    datas = tuple(getattr(runner.val_loop.dataloader.dataset, 'metainfo', {}).get('classes') or ())
    if not teachers or not datas or teachers == datas:
        return
    place = next((place for place, pair in enumerate(zip(teachers, datas, strict=False)) if pair[0] != pair[1]), None)
    found = (
        f'there are {len(teachers)} in {path} and {len(datas)} in the validation data'
        if place is None
        else f'class {place} is {teachers[place]!r} in {path} and {datas[place]!r} in the validation data'
    )
    if set(teachers) == set(datas):
        raise ValueError(
            f'the teacher knows the same classes in another order: {found}, so it would teach wrong '
            'classes. Give the dataset the order of the file (metainfo=dict(classes=...)), or train the '
            'teacher on these data'
        )
    runner.logger.warning(f"The teacher's classes have other names than those of the data: {found}.")


def check_mixing(preprocessor: Any, predicted: int) -> None:
    """Raise ValueError if mixed labels have another number of classes than the student."""
    mixes, mixed = getattr(preprocessor, 'batch_augments', None), getattr(preprocessor, 'num_classes', None)
    if mixes is not None and mixed != predicted:
        raise ValueError(
            f'data_preprocessor mixes labels of {mixed} classes and the student predicts {predicted}: set '
            f'num_classes={predicted} in data_preprocessor'
        )


def check_topk(runner: Runner, predicted: int) -> None:
    """Raise ValueError for a topk that mmpretrain would refuse only after the first epoch."""
    for metric in runner.val_loop.evaluator.metrics if runner.val_loop is not None else ():
        if isinstance(metric, Accuracy) and max(metric.topk) > predicted:
            raise ValueError(
                f'val_evaluator has topk={metric.topk} and the student predicts {predicted} classes: set '
                'val_evaluator = test_evaluator = dict(topk=(1, ))'
            )
