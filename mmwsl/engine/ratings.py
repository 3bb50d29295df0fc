"""Score a teacher by the metrics of a run's val_evaluator."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_gather_object, all_reduce, get_dist_info
from mmengine.evaluator import DumpResults, Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mmwsl.engine.runners import first_hook

_NAMES = ('mIoU', 'mAP', 'f1-score')  # ends of names, in order of preference
_WRITES = ('output_dir', 'outfile_prefix')  # where mmseg's and mmdet's metrics write predictions


class Figure(NamedTuple):
    """One figure of a metric, in its own unit, and the number of images it is from."""

    name: str
    value: float
    images: int
    constant: float | None
    """Score of predicting the best single class everywhere, if the figure is an mIoU."""


def rated(runner: Runner, model: Any, batches: int, evenly: bool = False) -> Figure | None:
    """Score a distillation's teacher with a copy of the run's metrics; return None, with a warning, if that fails.

    Args:
        runner: A runner with a validation loop; its evaluator and logger are not changed.
        model: The distillation, in eval mode.
        batches: Batches to predict in each process, at most.
        evenly: See :func:`some_batches`.
    """
    evaluator, error = _copied(runner.val_loop.evaluator), None
    images, pixels = torch.zeros(1, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    ids: list[Any] = []
    try:
        for batch in some_batches(runner.val_loop.dataloader, batches, evenly):
            prepared = model.data_preprocessor(batch, False)
            predicted = model.teacher(prepared['inputs'], prepared['data_samples'], mode='predict')
            evaluator.process(data_samples=predicted, data_batch=batch)
            images += len(predicted)
            pixels += sum(map(_pixels, predicted))
            ids.extend(sample.get('img_id') for sample in predicted)
    except Exception as raised:  # training needs no predictions, and may work all the same
        error = f'{type(raised).__name__}: {raised}'
    errors = [found for found in all_gather_object(error) if found]
    if errors:
        runner.logger.warning(f'The teacher was not checked: its predictions or the metric failed ({errors[0]}).')
        return None
    all_reduce(images)
    all_reduce(pixels)
    results = _evaluated(evaluator, int(images), [found for part in all_gather_object(ids) for found in part])
    name = chosen_figure(results, runner)
    if name is None:
        runner.logger.warning('The teacher was not checked: val_evaluator gives no number for its predictions.')
        return None
    constant = _constant_miou(pixels) if name.endswith('mIoU') and pixels[:255].any() else None
    return Figure(name, float(results[name]), int(images), constant)


def some_batches(dataloader: DataLoader, batches: int, evenly: bool = False) -> DataLoader:
    """Return this process's batches of random images, which are the same in every run.

    Args:
        dataloader: A dataloader of all images.
        batches: The largest number of batches.
        evenly: Leave out the last few images, fewer than there are processes, so that all processes have as many
            batches. A sharded network needs that, because all processes have to call it equally often.
    """
    rank, processes = get_dist_info()
    dataset, size = dataloader.dataset, dataloader.batch_size or 1
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    even = len(order) // processes * processes if evenly else len(order)
    chosen = order[:even][: batches * size * processes][rank::processes].tolist()
    return DataLoader(
        Subset(dataset, chosen), size, num_workers=dataloader.num_workers, collate_fn=dataloader.collate_fn
    )


def _copied(evaluator: Evaluator) -> Evaluator:
    """Return a copy of an evaluator with fresh metrics, without those that only write files."""
    copied = copy.copy(evaluator)
    copied.metrics = copy.deepcopy(
        [
            metric
            for metric in evaluator.metrics
            if not isinstance(metric, DumpResults) and not getattr(metric, 'format_only', False)
        ]
    )
    for metric in copied.metrics:
        metric.results = []
        for name in _WRITES:
            if getattr(metric, name, None) is not None:
                setattr(metric, name, None)
    return copied


def _evaluated(evaluator: Evaluator, images: int, ids: list[Any]) -> Mapping[str, Any]:
    for metric in evaluator.metrics:
        if hasattr(metric, 'img_ids'):  # CocoMetric would count all images of its file
            metric.img_ids = ids
    with _quiet():
        return evaluator.evaluate(images)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a metric's tables out of the log."""
    logger = MMLogger.get_current_instance()
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def chosen_figure(results: Mapping[str, Any], runner: Runner) -> str | None:
    """Return the name of the figure that counts: the one that ``save_best`` names, else mIoU, mAP or the F1 score, else
    the first number; None if there is no number."""
    numbers = [name for name, value in results.items() if is_number(value)]
    best = getattr(first_hook(runner, CheckpointHook), 'save_best', None)
    wanted = [name for name in ([best] if isinstance(best, str) else best or []) if name in numbers]
    return next(iter([*wanted, *(name for end in _NAMES for name in numbers if name.endswith(end)), *numbers]), None)


def is_number(value: Any) -> bool:
    """Whether a metric's result is one finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):  # a text, a list, a tensor of several
        return False


def _pixels(sample: Any) -> Tensor:
    """Return the number of pixels of each class in a segmentation target. Shape: (256, )."""
    if 'gt_sem_seg' not in sample:
        return torch.zeros(256, dtype=torch.int64)
    return torch.bincount(sample.gt_sem_seg.data.flatten().cpu().long().clamp(0, 255), minlength=256)


def _constant_miou(pixels: Tensor) -> float:
    """Return the mIoU of predicting the most frequent class everywhere, in per cent; 255 is no class."""
    pixels = pixels[:255]
    return 100 * float(pixels.max() / pixels.sum()) / int((pixels > 0).sum())
