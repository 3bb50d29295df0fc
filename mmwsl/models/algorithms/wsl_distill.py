from __future__ import annotations

import warnings
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import BaseDataElement
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.task_modules.recorder import ModuleOutputsRecorder
from mmrazor.models.utils import add_prefix
from mmrazor.registry import MODELS as RAZOR_MODELS
from torch import Tensor, nn

from mmwsl.models.algorithms.teacher import fold, freeze, set_teacher_mode, share_inputs
from mmwsl.registry import MODELS
from mmwsl.utils.checkpoint import load_network


@MODELS.register_module()
class WSLDistill(SingleTeacherDistill):
    """Distil a frozen teacher into a student, over MMRazor's SingleTeacherDistill.

    The teacher is wholly frozen: eval mode (dropout and drop-path too), no gradient, no loss of its own. It follows the
    model's device but is no part of it: no checkpoint, optimiser or DistributedDataParallel sees it. Resuming reads it
    from ``teacher_ckpt`` again.

    Args:
        distiller: Config of the distiller, e.g. ``dict(type='mmwsl.WSLDistiller')``.
        teacher: Config of the teacher, or the built network. With a data_preprocessor of its own it sees its own kind
            of input (mean, std, channel order).
        teacher_ckpt: Its checkpoint, loaded strictly. None builds an untrained teacher, with a warning, unless the
            teacher loads its weights itself, as an EnsembleTeacher does.
        teacher_norm_eval: False lets its BatchNorm predict with batch statistics while the student trains, as the
            authors' code does; its running statistics stay as loaded either way.
        teacher_fold: Fold the teacher's BatchNorm into its convolutions on the first batch, where nothing but its
            logits is read and they stay the same to 1e-4 of the largest. Never with ``teacher_norm_eval=False``.
        architecture: Config of the student, or the built network.
        kwargs: As of SingleTeacherDistill: ``data_preprocessor``, ``student_trainable``, ``calculate_student_loss``,
            ``init_cfg`` and so on.

    Raises:
        ValueError: If the checkpoint does not fit the teacher, or ``teacher_trainable`` is asked for.
    """

    def __init__(self, distiller: dict, teacher: Any, teacher_ckpt: str | None = None, teacher_norm_eval: bool = True,
                 teacher_fold: bool = True, teacher_trainable: bool = False, *, architecture: Any,
                 **kwargs: Any) -> None:
        if teacher_trainable:
            raise ValueError('WSLDistill keeps its teacher frozen, got teacher_trainable=True. MMRazor has '
                             'SingleTeacherDistill for a teacher that learns')
        # the student first, as MMRazor builds it: from one seed it then begins with the same weights
        student = RAZOR_MODELS.build(architecture) if isinstance(architecture, dict) else architecture
        network = RAZOR_MODELS.build(teacher) if isinstance(teacher, dict) else teacher
        # before recorders hook into layers that this may replace
        network = revert_sync_batchnorm(network)
        super().__init__(distiller, network, teacher_norm_eval=teacher_norm_eval, architecture=student, **kwargs)
        del self._modules['teacher']
        # no submodule: see the class's docstring. deepcopy, pickle and _apply still reach it
        object.__setattr__(self, 'teacher', network)
        freeze(network, teacher_norm_eval)
        self._load_teacher(teacher, teacher_ckpt)
        self._keep_batch_augments()
        named = isinstance(teacher, dict) and teacher.get('data_preprocessor') is not None
        share_inputs(network, self.data_preprocessor, normalises=named)
        self._teacher_mode = 'tensor'
        self._teacher_is_ready = False
        self.teacher_fold = teacher_fold
        self._register_load_state_dict_pre_hook(_drop_teacher)
        self.train(self.training)

    def _load_teacher(self, teacher: Any, teacher_ckpt: str | None) -> None:
        init_cfg = getattr(self.teacher, 'init_cfg', None)
        if teacher_ckpt is None and isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            teacher_ckpt = init_cfg['checkpoint']
        self._teacher_is_trained = teacher_ckpt is not None or not isinstance(teacher, dict) or bool(
            teacher.get('pretrained')) or getattr(self.teacher, 'is_init', False)
        if teacher_ckpt is not None:
            load_network(self.teacher, teacher_ckpt)
        elif not self._teacher_is_trained:
            warnings.warn('teacher_ckpt is None: the teacher is untrained, and a student learns nothing from it. Name '
                          'its checkpoint in model.teacher_ckpt', UserWarning, stacklevel=2)

    def _keep_batch_augments(self) -> None:
        """Mix as the student's ``train_cfg`` says, though its preprocessor gives way to the algorithm's."""
        own: Any = getattr(self.student, 'data_preprocessor', None)
        shared: Any = self.data_preprocessor
        augments = getattr(own, 'batch_augments', None)
        if augments is not None and getattr(shared, 'batch_augments', None) is None:
            shared.batch_augments, shared.to_onehot = augments, True
            shared.num_classes = shared.num_classes or own.num_classes

    def init_weights(self) -> None:
        """Initialise the student, and a teacher that has no checkpoint."""
        super().init_weights()
        if not self._teacher_is_trained:
            self.teacher.init_weights()

    def loss(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None) -> dict[str, Tensor]:
        """The student's losses under ``student.``, the distiller's losses and statistics under ``distill.``."""
        if not self.distillation_stopped or self.distiller.deliveries.deliveries:
            self._teach(batch_inputs, data_samples)
        self.distiller.set_deliveries_override(True)
        learns = self.calculate_student_loss or self.student_trainable
        with self.distiller.student_recorders, self.distiller.deliveries, torch.set_grad_enabled(learns):
            student_losses = self.student(batch_inputs, data_samples, mode='loss')
        losses = add_prefix(student_losses, 'student') if self.calculate_student_loss else {}
        if not self.distillation_stopped:
            losses.update(add_prefix(self.distiller.compute_distill_losses(), 'distill'))
        return losses

    def _teach(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None) -> None:
        """Run the teacher for what recorders and deliveries take from it.

        Logits come from ``mode='tensor'``. Only where that leaves a recorder or a delivery with nothing, because its
        source lies in the head's loss, does the teacher run in ``mode='loss'``; the first batch finds it out.
        """
        if not self._teacher_is_ready and self.teacher_fold and self._only_logits_are_read():
            fold(self.teacher, batch_inputs)
        self._run_teacher(batch_inputs, data_samples)
        if not self._teacher_is_ready and self._something_is_missing():
            self._teacher_mode = 'loss'
            for delivery in self.distiller.deliveries.deliveries.values():
                delivery.data_queue.clear()
            self._run_teacher(batch_inputs, data_samples)
        self._teacher_is_ready = True

    def _only_logits_are_read(self) -> bool:
        recorders = self.distiller.teacher_recorders.recorders.values()
        outside = all(type(recorder) is ModuleOutputsRecorder and recorder.source in ('', 'head')
                      for recorder in recorders)
        return outside and self.teacher_norm_eval and not self.distiller.deliveries.deliveries

    @torch.no_grad()
    def _run_teacher(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None) -> None:
        self.distiller.set_deliveries_override(False)
        with self.distiller.teacher_recorders, self.distiller.deliveries:
            self.teacher(batch_inputs, data_samples, mode=self._teacher_mode)

    def _something_is_missing(self) -> bool:
        recorders = self.distiller.teacher_recorders.recorders.values()
        deliveries = self.distiller.deliveries.deliveries.values()
        return (any(len(recorder.data_buffer) == 0 for recorder in recorders)
                or any(len(delivery.data_queue) == 0 for delivery in deliveries))

    def train(self, mode: bool = True) -> WSLDistill:
        """Set the student's mode; the teacher stays in eval mode, but for BatchNorm with teacher_norm_eval=False."""
        nn.Module.train(self, mode)
        if 'teacher' in self.__dict__:  # not yet while the base class is being made
            set_teacher_mode(self.teacher, use_batch_statistics=mode and not self.teacher_norm_eval)
        return self

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> WSLDistill:
        super()._apply(fn, *args, **kwargs)
        self.teacher._apply(fn, *args, **kwargs)
        return self


def _drop_teacher(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Skip the teacher in a checkpoint of MMRazor's SingleTeacherDistill, which holds one."""
    for key in [key for key in state_dict if key.startswith(f'{prefix}teacher.')]:
        del state_dict[key]
