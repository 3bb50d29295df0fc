from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import EMAHook
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmwsl.datasets.views import seeded_generators
from mmwsl.engine.class_checks import check_classes, check_mixing, check_order_of_classes, check_topk
from mmwsl.engine.hooks.check_labels_hook import CheckLabelsHook, predicted_classes
from mmwsl.engine.likely_inputs import better_input
from mmwsl.engine.ratings import Figure, rated, some_batches
from mmwsl.engine.runners import counts_iterations
from mmwsl.models.teachers import CachedTeacher
from mmwsl.models.weightings import WSLWeighting
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model
from mmwsl.utils.data import single_labels

_TRIED = 128  # images on which other kinds of input are tried
_ADVICE = (
    'Is teacher_ckpt the right file, was it trained for long enough, and do data_preprocessor (mean, std, to_rgb) and '
    'the order of the classes fit it?'
)
_UNLESS = "If this is intended, set min_score of the hook 'mmwsl.CheckTeacherHook' in custom_hooks to 0."


@HOOKS.register_module()
class CheckTeacherHook(CheckLabelsHook):
    """Compare classes and score the teacher before the first step; stop a run that cannot succeed.

    A teacher from a wrong checkpoint scores no better than chance. A wrong order of channels or normalisation may cost
    only half of its accuracy, so the usual ones are tried on the same images, and one that is clearly better (by more
    than 5 points and three standard errors) is named. Classes in another order are found by the names that mmengine's
    checkpoints hold. Only ``expected_score`` finds two swapped classes in a file without names, or a teacher that is
    merely worse than it was.

    The score is logged. It is measured on validation data in eval mode, whatever ``teacher_norm_eval`` is; a cached
    teacher is scored on its cached views. With one label per image, the score is top-1. For other tasks it is a
    figure of the ``val_evaluator``: the one that ``save_best`` of the CheckpointHook names, or mIoU, mAP or the F1
    score, in the unit in which the metric prints it.

    Args:
        max_batches: Batches of validation images to look at in each process, at most. They are drawn at random, since
            images may be sorted by class.
        min_accuracy: ``min_score`` as a fraction in [0, 1].
        expected_score: Top-1 in per cent, or the metric's figure, that the teacher is known to have. The run stops if
            the score is lower by more than 3 points and three standard errors of the images looked at; for a metric,
            the largest standard error that a score per image can have.
        min_score: Top-1 in per cent, or the metric's figure, below which the run stops. None: twice chance, 2 / C (for
            two classes, halfway between chance and perfect); for mIoU, chance is the best single class everywhere; no
            other figure stops the run. 0 never stops it.

    Raises:
        RuntimeError: If the teacher scores less, or its outputs are not finite.
        ValueError: If teacher and student predict different numbers of classes, or fewer than the data have or than a
            metric ranks; if training and validation data have different classes, or the teacher's file has them in
            another order; if a label is no class; if a loss has warmup_epochs in a run by iterations.
        CacheError: If a file of L_t is of other images or labels than the training set.
    """

    def __init__(
        self,
        max_batches: int = 10,
        min_accuracy: float | None = None,
        expected_score: float | None = None,
        min_score: float | None = None,
    ) -> None:
        if min_accuracy is not None and min_score is not None:
            raise ValueError(
                f'min_accuracy={min_accuracy} and min_score={min_score} both set the lowest score: leave '
                'min_accuracy out'
            )
        self.max_batches = max_batches
        self.min_score = min_score if min_accuracy is None else 100 * min_accuracy
        self.expected_score = expected_score
        self.found: tuple[Figure, str] | None = None
        """The teacher's figure and the kind of images; None before a run, or if it could not be scored."""

    def before_train(self, runner: Runner) -> None:
        model = unwrapped_model(runner.model)
        predicted = predicted_classes(model)
        check_classes(runner, predicted)
        super().before_train(runner)
        if predicted:
            check_mixing(model.data_preprocessor, predicted)
            check_topk(runner, predicted)
        if getattr(model, 'teacher', None) is None:
            return
        _check_warmup(runner, model)
        _tell_of_copies(runner, model.teacher)
        _check_teacher_losses(model, runner.train_dataloader.dataset)
        if isinstance(model.teacher, CachedTeacher):
            cached = model.teacher.cache.manifest
            self._judge(
                runner,
                _Score(model.teacher.top1, cached.views * cached.length, cached.answer_format.classes),
                'cached views of training images',
            )
            return
        if runner.val_loop is None:
            runner.logger.warning('The teacher was not checked: there is no validation data (val_dataloader).')
            return
        check_order_of_classes(runner)
        was_training = model.training
        model.eval()
        place = model.frozen_teacher.place if hasattr(model, 'frozen_teacher') else model.teacher.to
        place(model.data_preprocessor.device)  # a sharding strategy leaves it on the CPU
        # a check must not change the random numbers of training
        with torch.no_grad(), torch.random.fork_rng(_devices()), seeded_generators(0):
            score = self._score(runner, model)
            evenly = _goes_together(runner, model)
            figure = rated(runner, model, self.max_batches, evenly) if score is None else None
        model.train(was_training)
        if score is not None and score.images:
            self._judge(runner, score, 'validation images')
        elif figure is not None:
            self._judge_figure(runner, figure)

    def _score(self, runner: Runner, model: Any) -> _Score | None:
        """Score the teacher on all processes' images; None unless it predicts one label. Connectors leave no image."""
        counts, classes = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        batches = some_batches(runner.val_loop.dataloader, self.max_batches, _goes_together(runner, model))
        for batch_idx, batch in enumerate(batches):
            batch = model.data_preprocessor(batch, False)
            inputs, target = batch['inputs'], single_labels(batch['data_samples'])
            logits = model.teacher(inputs, batch['data_samples'], mode='tensor')
            tree_map(_check_finite, logits)
            if not isinstance(logits, Tensor) or logits.dim() != 2 or target is None:
                counts[2] += 1
                break
            right = logits.argmax(1).cpu() == target
            if batch_idx == 0:
                classes.fill_(logits.shape[1])
                if not _compares_alike(runner, model, batch, logits.shape[1]):
                    break
                if not _is_sharded(model):  # it looks at one process's images
                    _name_better_input(runner, model, inputs[:_TRIED], target[:_TRIED], right[:_TRIED])
            counts[0] += right.sum()
            counts[1] += len(target)
        all_reduce(counts)
        all_reduce(classes, 'max')  # a process may have no image
        correct, total, others = counts.tolist()
        return None if others else _Score(correct / max(total, 1), total, int(classes))

    def _judge(self, runner: Runner, score: _Score, images: str) -> None:
        accuracy, chance = 100 * score.accuracy, 100 / score.classes
        least = _least(chance) if self.min_score is None else self.min_score
        runner.logger.info(f'Teacher: {accuracy:.2f} % top-1 on {score.images} {images}.')
        self.found = Figure('accuracy/top1', accuracy, score.images, chance), images
        found = f'The teacher gets {accuracy:.2f} % of {score.images} {images} right'
        if accuracy < least:
            raise RuntimeError(f'{found}; chance is {chance:.2f} % and {least:.2f} % is required. {_ADVICE} {_UNLESS}')
        tolerance = 100 * _tolerance(score.accuracy, score.images)
        if self.expected_score is not None and accuracy < self.expected_score - tolerance:
            raise RuntimeError(
                f"{found}, but expected_score of the hook 'mmwsl.CheckTeacherHook' is "
                f'{self.expected_score:.2f} % (give or take {tolerance:.2f}). {_ADVICE}'
            )

    def _judge_figure(self, runner: Runner, figure: Figure) -> None:
        name, value, images, constant = figure
        runner.logger.info(f'Teacher: {name} {value:.4g} on {images} validation images.')
        self.found = figure, 'validation images'
        found = f'The teacher has a {name} of {value:.4g} on {images} validation images'
        least = self.min_score if self.min_score is not None or constant is None else _least(constant)
        if least is not None and value < least:
            chance = '' if constant is None else f'the best class everywhere has {constant:.4g} and '
            raise RuntimeError(f'{found}; {chance}{least:.4g} is required. {_ADVICE} {_UNLESS}')
        if self.expected_score is None:
            return
        full = 1 if self.expected_score <= 1 else 100  # mmdet prints shares, others per cent
        tolerance = full * _tolerance(min(max(value / full, 0), 1), images)
        if value < self.expected_score - tolerance:
            raise RuntimeError(
                f"{found}, but expected_score of the hook 'mmwsl.CheckTeacherHook' is "
                f'{self.expected_score:.4g} (give or take {tolerance:.2g}). {_ADVICE}'
            )


def _is_sharded(model: Any) -> bool:
    return hasattr(model, 'frozen_teacher') and model.frozen_teacher.is_sharded


def _goes_together(runner: Runner, model: Any) -> bool:
    """Whether a pass of the teacher or of the student may gather shards from all processes."""
    return _is_sharded(model) or isinstance(runner, FlexibleRunner)


def _least(chance: float) -> float:
    """Return the smaller of twice chance and halfway between chance and perfect, in per cent."""
    return min(2 * chance, (100 + chance) / 2)


def _tolerance(share: float, images: int) -> float:
    """Return 3 points or, if larger, three standard errors of a share of images, in [0, 1]."""
    return max(0.03, 3 * math.sqrt(share * (1 - share) / images))


class _Score(NamedTuple):
    """A teacher's accuracy, in [0, 1], with the numbers of images and classes."""

    accuracy: float
    images: int
    classes: int


def _check_warmup(runner: Runner, model: Any) -> None:
    for name, loss in getattr(getattr(model, 'distiller', None), 'distill_losses', {}).items():
        if getattr(loss, 'warmup_epochs', 0) and counts_iterations(runner):
            raise ValueError(
                f'{name}: warmup_epochs={loss.warmup_epochs} counts epochs, and this run counts '
                f'iterations, so the loss would keep 1/{loss.warmup_epochs} of its weight. Set '
                'warmup_epochs=0, or train by epochs (train_cfg.by_epoch=True)'
            )


def _tell_of_copies(runner: Runner, teacher: nn.Module) -> None:
    """Log the memory that EMAHook needs to copy the teacher with the model, although it does not average it."""
    if any(isinstance(hook, EMAHook) for hook in runner.hooks):
        size = sum(value.numel() * value.element_size() for value in teacher.state_dict().values()) / 1e6
        runner.logger.info(f'EMAHook also copies the teacher: {size:.3g} MB more.')


def _check_teacher_losses(model: Any, dataset: Any) -> None:
    """Compare each file of L_t with the training set."""
    for module in getattr(model, 'distiller', nn.Module()).modules():
        if isinstance(module, WSLWeighting) and module.teacher_losses is not None:
            module.teacher_losses.check(dataset)


def _check_finite(logits: Any) -> None:
    if not isinstance(logits, Tensor):
        return
    bad = int((~torch.isfinite(logits)).flatten(1).any(1).sum())
    if bad:
        raise RuntimeError(
            f"the teacher's logits are not finite for {bad} of {len(logits)} validation images, so the "
            'loss would be nan. Is teacher_ckpt complete, and its data_preprocessor right?'
        )


def _compares_alike(runner: Runner, model: Any, batch: dict, classes: int) -> bool:
    """Whether teacher and student predict equally many classes; raise ValueError unless connectors join them."""
    # through the wrapper, which gathers shards; DeepSpeed's cannot be called, but gathers part by part
    network = runner.model if callable(runner.model) else model
    student = network(batch['inputs'], batch['data_samples'], mode='tensor')
    if not isinstance(student, Tensor) or student.dim() != 2 or student.shape[1] == classes:
        return True
    if len(getattr(getattr(model, 'distiller', None), 'connectors', ())):
        runner.logger.warning(
            f'The teacher predicts {classes} classes and the student {student.shape[1]}, and '
            'connectors join them, so the teacher was not scored.'
        )
        return False
    raise ValueError(
        f'the teacher predicts {classes} classes and the student {student.shape[1]}: set num_classes of '
        'the heads (and of data_preprocessor) to the same number'
    )


def _name_better_input(runner: Runner, model: Any, inputs: Tensor, target: Tensor, right: Tensor) -> None:
    """Log a warning if the teacher does clearly better with another order of channels or normalisation."""
    # not model.teacher(...), whose hook adapts the student's input
    found = better_input(
        lambda images: model.teacher.forward(images, mode='tensor'),
        float(right.double().mean()),
        inputs,
        target,
        model.data_preprocessor,
    )
    if found:
        runner.logger.warning(
            f'The teacher gets {100 * float(right.double().mean()):.0f} % of {len(target)} images right as they are, '
            f'and {100 * found[1]:.0f} % with {found[0]}. Give model.teacher its own data_preprocessor, with the '
            'mean, std and to_rgb that it was trained with.'
        )


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
