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

from mmwsl.cache import CacheError
from mmwsl.models.teachers import CachedTeacher
from mmwsl.models.teachers.fast import check_speed, fast_forward
from mmwsl.models.teachers.inputs import freeze, set_teacher_mode, share_inputs
from mmwsl.registry import MODELS
from mmwsl.utils.checkpoint import STUDENT, load_network


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
        teacher_speed: How it runs while training reads nothing but its logits. 'fold': BatchNorm folded into the
            convolutions (not with ``teacher_norm_eval=False``) and weights laid out channels last, both only where
            logits stay the same to 1e-4 of the largest. 'bf16': that, in bfloat16; logits change by per cents.
            'compile': folded and compiled by torch, which takes its time on the first batch. 'compile_bf16': all of
            it. 'plain': as it is, as also whenever a recorder or delivery reads inside it.
        teacher_cache: Folder that tools/cache_teacher.py filled with this teacher's answers. The network is then not
            built, and ``teacher`` and ``teacher_ckpt`` say which teacher it should be. Needs the dataset
            ``mmwsl.CachedViews`` over the same folder.
        kwargs: As of SingleTeacherDistill: ``architecture`` (the student), ``data_preprocessor``,
            ``student_trainable``, ``calculate_student_loss``, ``init_cfg`` and so on.

    Raises:
        ValueError: If the checkpoint does not fit the teacher, ``teacher_trainable`` is asked for, or teacher_speed is
            none of these; or where a cached teacher cannot give what the losses need.
        CacheError: If the cache is missing, unfinished, damaged, or of another teacher; the fields are named.
    """

    def __init__(self, distiller: dict, teacher: Any, teacher_ckpt: str | None = None, teacher_norm_eval: bool = True,
                 teacher_speed: str = 'fold', teacher_trainable: bool = False, teacher_cache: str | None = None,
                 **kwargs: Any) -> None:
        if teacher_trainable:
            raise ValueError('WSLDistill keeps its teacher frozen, got teacher_trainable=True. MMRazor has '
                             'SingleTeacherDistill for a teacher that learns')
        check_speed(teacher_speed)
        cached = CachedTeacher(teacher_cache) if teacher_cache else None
        distiller = cached.recorded_by(distiller) if cached else distiller
        network = cached or _built(teacher)
        # before recorders hook into layers that this may replace
        network = revert_sync_batchnorm(network)
        super().__init__(distiller, network, teacher_norm_eval=teacher_norm_eval, **kwargs)
        del self._modules['teacher']
        # no submodule: see the class's docstring. deepcopy, pickle and _apply still reach it
        object.__setattr__(self, 'teacher', network)
        freeze(network, teacher_norm_eval)
        self._keep_batch_augments()
        if cached:
            self._teacher_is_trained = True
            cached.check(teacher, teacher_ckpt, teacher_norm_eval, self.data_preprocessor)
            cached.serve(self.distiller)
        else:
            self._load_teacher(teacher, teacher_ckpt)
            named = isinstance(teacher, dict) and teacher.get('data_preprocessor') is not None
            share_inputs(network, self.data_preprocessor, normalises=named)
        self.teacher_speed = 'plain' if cached else teacher_speed
        self._forget_fast_teacher()
        self._register_load_state_dict_pre_hook(_keep_student)
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
            if not hasattr(shared, 'batch_augments'):
                raise ValueError("the student's train_cfg mixes images, and the algorithm's data_preprocessor, a "
                                 f'{type(shared).__name__}, cannot: take mmpretrain.ClsDataPreprocessor')
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
        with self.distiller.student_recorders, self.distiller.deliveries, torch.set_grad_enabled(
                learns and torch.is_grad_enabled()):
            student_losses = self.student(batch_inputs, data_samples, mode='loss')
        losses = add_prefix(student_losses, 'student') if self.calculate_student_loss else {}
        if not self.distillation_stopped:
            losses.update(add_prefix(self.distiller.compute_distill_losses(), 'distill'))
        return losses

    def _teach(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None) -> None:
        """Run the teacher for what recorders and deliveries take from it; the first batch finds out how."""
        if not self._teacher_is_ready:
            self._refuse_idle_records(data_samples)
            self._choose_teacher_mode(batch_inputs, data_samples)
        if self._fast_teacher is None or not self.training:  # with batch statistics it is another teacher in eval mode
            self._run_teacher(batch_inputs, data_samples)
        else:
            self._run_fast_teacher(batch_inputs)

    def _refuse_idle_records(self, data_samples: list[BaseDataElement] | None) -> None:
        if data_samples and 'teacher_record' in data_samples[0] and not isinstance(self.teacher, CachedTeacher):
            raise CacheError('the samples carry records of a teacher, and the model teaches live: set '
                             'model.teacher_cache to the folder of mmwsl.CachedViews, or take mmwsl.SeededViews')

    def teacher_logits(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None) -> Tensor:
        """What a loss is given as ``preds_T``. Shape: (N, C)."""
        self._teach(batch_inputs, data_samples)
        return self.distiller.get_record('logits', from_student=False)

    @torch.compiler.disable  # it compiles and copies networks itself
    def _choose_teacher_mode(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None) -> None:
        """Logits come from ``mode='tensor'``, and fast if nothing else is read.

        Only where that leaves a recorder or a delivery with nothing, because its source lies in the head's loss, does
        the teacher run in ``mode='loss'``.
        """
        logits = self._run_teacher(batch_inputs, data_samples)
        if self._something_is_missing():
            self._teacher_mode = 'loss'
        elif self.training and self._only_these_are_read(logits):
            self._fast_teacher = fast_forward(self.teacher, batch_inputs, self.teacher_speed)
        for delivery in self.distiller.deliveries.deliveries.values():
            delivery.data_queue.clear()
        self._teacher_is_ready = self.training

    def _only_these_are_read(self, logits: Any) -> bool:
        recorders = self.distiller.teacher_recorders.recorders.values()
        return not self.distiller.deliveries.deliveries and all(
            type(recorder) is ModuleOutputsRecorder and len(recorder.data_buffer) == 1
            and recorder.data_buffer[0] is logits for recorder in recorders)

    @torch.no_grad()
    def _run_teacher(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None) -> Any:
        self.distiller.set_deliveries_override(False)
        with self.distiller.teacher_recorders, self.distiller.deliveries:
            return self.teacher(batch_inputs, data_samples, mode=self._teacher_mode)

    @torch.no_grad()
    def _run_fast_teacher(self, batch_inputs: Tensor) -> None:
        logits = self._fast_teacher(batch_inputs)  # type: ignore[misc]
        with self.distiller.teacher_recorders:
            for recorder in self.distiller.teacher_recorders.recorders.values():
                recorder.forward_hook(self.teacher, (batch_inputs, ), logits)

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
        self._forget_fast_teacher()
        return self

    def _forget_fast_teacher(self) -> None:
        """It is a copy of the teacher as it was; the next batch makes another."""
        self._fast_teacher, self._teacher_is_ready, self._teacher_mode = None, False, 'tensor'

    def __getstate__(self) -> dict:
        """Without the fast teacher, which cannot be pickled or copied once it is compiled."""
        return {**super().__getstate__(), '_fast_teacher': None, '_teacher_is_ready': False}


def _built(teacher: Any) -> Any:
    """The network. What it draws changes nothing: a student begins alike whoever teaches it, live or from a cache."""
    with torch.random.fork_rng(devices=[]):
        return RAZOR_MODELS.build(teacher) if isinstance(teacher, dict) else teacher


def _keep_student(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Skip the teacher in a checkpoint of MMRazor's SingleTeacherDistill, and refuse one without a student.

    mmengine loads loosely: from a network's own file it would take nothing, and a run would go on untrained.
    """
    for key in [key for key in state_dict if key.startswith(f'{prefix}teacher.')]:
        del state_dict[key]
    if state_dict and not any(key.startswith(prefix + STUDENT) for key in state_dict):
        raise ValueError(f'the checkpoint holds no student: none of its keys begins with {STUDENT!r} (the first is '
                         f'{next(iter(state_dict))!r}). load_from and --resume take checkpoints of a distillation; to '
                         "start a student from a network's own file, set model.architecture.init_cfg="
                         "dict(type='Pretrained', checkpoint=...)")
