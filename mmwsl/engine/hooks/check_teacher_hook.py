from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.evaluation import Accuracy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mmwsl.models.teachers import CachedTeacher
from mmwsl.registry import HOOKS
from mmwsl.utils.data import single_labels


@HOOKS.register_module()
class CheckTeacherHook(Hook):
    """Before the first step, compare classes and score the teacher on validation data; stop a run that cannot succeed.

    A wrong checkpoint, other class order or other normalisation all show as a teacher that knows no more than chance.
    The figure is logged. It is the teacher's in eval mode, whatever ``teacher_norm_eval`` says; a cached teacher's is
    that of its recorded views.

    Args:
        max_batches: Batches of validation images to look at in each process, at most; which ones, chance says, since
            they may lie in order of their classes.
        min_accuracy: Top-1 in [0, 1] below which the run stops. None: twice chance, 2 / C (for two classes, halfway
            between chance and perfect). 0 never stops it.

    Raises:
        RuntimeError: If the teacher scores less.
        ValueError: If teacher and student predict different numbers of classes, or fewer than the data have or than a
            metric ranks; or if training and validation data have different classes.
    """

    def __init__(self, max_batches: int = 10, min_accuracy: float | None = None) -> None:
        self.max_batches = max_batches
        self.min_accuracy = min_accuracy

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        predicted = getattr(getattr(getattr(model, 'student', model), 'head', None), 'num_classes', None)
        _check_labels(runner, predicted)
        if predicted:
            _check_mixing(model.data_preprocessor, predicted)
            _check_topk(runner, predicted)
        if getattr(model, 'teacher', None) is None:
            return
        if isinstance(model.teacher, CachedTeacher):
            recorded = model.teacher.cache.manifest
            self._judge(runner, model.teacher.top1, f'{recorded.views * recorded.length} recorded views of training '
                        'images', recorded.record.classes)
            return
        if runner.val_loop is None:
            runner.logger.warning('The teacher was not checked: there is no validation data (val_dataloader).')
            return
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(_devices()):  # a check must not change what training draws
            correct, total, classes = self._score(model, runner.val_loop.dataloader)
        model.train(was_training)
        if total == 0:
            runner.logger.warning('The teacher was not checked: its outputs and the validation targets are not one '
                                  'score per class and one class per image.')
            return
        self._judge(runner, correct / total, f'{total} validation images', classes)

    def _score(self, model: Any, dataloader: Any) -> tuple[int, int, int]:
        """Images that the teacher gets right, images seen, classes."""
        counts, classes = torch.zeros(2, dtype=torch.int64), 0
        for batch_idx, batch in enumerate(_some(dataloader, self.max_batches)):
            batch = model.data_preprocessor(batch, False)
            logits = model.teacher(batch['inputs'], batch['data_samples'], mode='tensor')
            target = single_labels(batch['data_samples'])
            if not isinstance(logits, Tensor) or logits.dim() != 2 or target is None:
                break
            if batch_idx == 0:
                classes = logits.shape[1]
                _check_classes(model.student(batch['inputs'], batch['data_samples'], mode='tensor'), classes)
            counts += torch.tensor([(logits.argmax(1).cpu() == target).sum(), len(target)])
        all_reduce(counts)
        return int(counts[0]), int(counts[1]), classes

    def _judge(self, runner: Runner, accuracy: float, images: str, classes: int) -> None:
        chance = 1 / classes
        least = min(2 * chance, (1 + chance) / 2) if self.min_accuracy is None else self.min_accuracy
        runner.logger.info(f'Teacher: {100 * accuracy:.2f} % top-1 on {images}.')
        if accuracy < least:
            raise RuntimeError(
                f'The teacher gets {100 * accuracy:.2f} % of {images} right; chance is '
                f'{100 * chance:.2f} % and {100 * least:.2f} % is required. Is teacher_ckpt the right file, and do '
                'data_preprocessor (mean, std, to_rgb) and the order of the classes fit it? If it is meant to be so, '
                "set min_accuracy of the hook 'mmwsl.CheckTeacherHook' in custom_hooks to 0.")


def _some(dataloader: DataLoader, batches: int) -> DataLoader:
    """This process's batches of the same random images in every run."""
    rank, processes = get_dist_info()
    dataset, size = dataloader.dataset, dataloader.batch_size or 1
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    chosen = order[:batches * size * processes][rank::processes].tolist()
    return DataLoader(Subset(dataset, chosen), size, num_workers=dataloader.num_workers,
                      collate_fn=dataloader.collate_fn)


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def _check_labels(runner: Runner, predicted: int | None) -> None:
    loops = [loop for loop in (runner.train_loop, runner.val_loop) if loop is not None]
    names = [tuple(getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes') or ()) for loop in loops]
    if len(set(filter(None, names))) > 1:
        raise ValueError('training and validation data have different classes, so a label means another class in each; '
                         f'only in training: {sorted(set(names[0]) - set(names[1]))}, only in validation: '
                         f'{sorted(set(names[1]) - set(names[0]))}, or the order differs. Give both the same class '
                         'folders, an empty one for a class without images')
    found = len(max(names))
    if not found or not predicted or found == predicted:
        return
    message = (f'the data have {found} classes and the student predicts {predicted}: set num_classes of the heads (and '
               'of data_preprocessor) to the same number')
    if found > predicted:
        raise ValueError(message)
    runner.logger.warning(f'{message}, unless the others are meant to stay unused.')


def _check_mixing(preprocessor: Any, predicted: int) -> None:
    mixes, mixed = getattr(preprocessor, 'batch_augments', None), getattr(preprocessor, 'num_classes', None)
    if mixes is not None and mixed != predicted:
        raise ValueError(f'data_preprocessor mixes labels of {mixed} classes and the student predicts {predicted}: set '
                         f'num_classes={predicted} in data_preprocessor')


def _check_topk(runner: Runner, predicted: int) -> None:
    """What mmpretrain says after the first epoch."""
    for metric in runner.val_loop.evaluator.metrics if runner.val_loop is not None else ():
        if isinstance(metric, Accuracy) and max(metric.topk) > predicted:
            raise ValueError(f'val_evaluator has topk={metric.topk} and the student predicts {predicted} classes: set '
                             'val_evaluator = test_evaluator = dict(topk=(1, ))')


def _check_classes(student_logits: Any, classes: int) -> None:
    if isinstance(student_logits, Tensor) and student_logits.dim() == 2 and student_logits.shape[1] != classes:
        raise ValueError(f'the teacher predicts {classes} classes and the student {student_logits.shape[1]}: set '
                         'num_classes of the heads (and of data_preprocessor) to the same number')
