from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.utils import add_prefix
from mmrazor.registry import MODELS as RAZOR_MODELS
from torch import Tensor, nn

from mmwsl.cache.fingerprint import teacher_files
from mmwsl.models.algorithms.preprocessors import check_settings, keep_batch_augments
from mmwsl.models.losses import WeightedLoss
from mmwsl.models.teachers import CachedTeacher, FrozenTeacher
from mmwsl.models.teachers.fast import check_speed
from mmwsl.models.teachers.recording import hook_again, recording, tell_of_breaks
from mmwsl.registry import MODELS
from mmwsl.utils.checkpoint import STUDENT, check_files, load_network
from mmwsl.utils.data import send_batch


@MODELS.register_module()
class WSLDistill(SingleTeacherDistill):
    """Distils a frozen teacher into a student; derived from MMRazor's SingleTeacherDistill.

    The teacher is a :class:`mmwsl.models.teachers.FrozenTeacher`, ``model.frozen_teacher``: always in eval mode
    (dropout and drop-path included), without gradient or loss. Its network, ``model.teacher``, follows the model's
    device but is not a part of it: it is in no checkpoint, optimiser, DistributedDataParallel or FSDP, and each process
    holds it whole unless ``teacher_sharding`` is set. A resumed run reads it from ``teacher_ckpt`` again. A network
    that is assigned to ``model.teacher`` replaces it.

    Args:
        distiller: Config of the distiller, e.g. ``dict(type='mmwsl.WSLDistiller')``.
        teacher: Config of the teacher, or the built network. ``dict(cfg_path='mmpretrain::...', pretrained=True)`` uses
            a model and its weights from another package, also for ``architecture``. If it has a data_preprocessor, the
            teacher receives the input that this would prepare (mean, std, channel order).
        teacher_ckpt: Checkpoint of the teacher, loaded strictly. None builds an untrained teacher, with a warning,
            unless the teacher loads its weights itself, as an EnsembleTeacher does.
        teacher_sha256: SHA-256 of that file (``sha256sum FILE``), or a list of those of an ensemble's files; eight
            digits are enough. A different file stops the run. None only logs the SHA-256.
        teacher_norm_eval: False lets the teacher's BatchNorm predict with batch statistics while the student trains, as
            in the authors' code; its running statistics never change.
        teacher_speed: How the teacher runs while only its output is read in training. 'fold': with BatchNorm folded
            into the convolutions (not with ``teacher_norm_eval=False``) and weights laid out channels last, each only
            if logits stay the same to 1e-4 of the largest. 'bf16': the same in bfloat16, which changes logits by
            one or two per cent of the largest. 'compile': folded and compiled by torch, which takes time on the first
            batch. 'compile_bf16': all of these. 'plain': unchanged, as it also runs whenever a recorder, delivery or
            hook reads inside it.
        teacher_cache: Folder that tools/cache_teacher.py filled with this teacher's answers. The network is then not
            built, and ``teacher`` and ``teacher_ckpt`` tell which teacher is expected. Needs the dataset
            ``mmwsl.CachedViews`` with the same folder.
        teacher_sharding: True splits the teacher over the processes of a run, whatever strategy trains the student.
            Each holds its part and gathers a layer when it is needed. Use it for a teacher that is too large for one
            GPU; it then runs as with ``teacher_speed='plain'``. In a single process it stays whole.
        student_loss_weight: Factor of the student's own losses, also in the log: 0.1 in Hinton's recipe
            0.1 CE + 0.9 tau^2 KL. Values that the student only logs are not scaled.
        kwargs: As for SingleTeacherDistill: ``architecture`` (the student), ``data_preprocessor``,
            ``student_trainable``, ``calculate_student_loss``, ``init_cfg`` and so on.

    Raises:
        ValueError: If the checkpoint does not fit the teacher, ``teacher_trainable`` is set, teacher_speed is unknown,
            the teacher's file does not match teacher_sha256, student_loss_weight is negative, not finite, or applies to
            losses that are not calculated, the architecture has a data_preprocessor that differs from the algorithm's,
            which prepares its images, or a cached teacher cannot provide what the losses need.
        CacheError: If the cache is missing, unfinished, damaged, or of another teacher; the message names the fields
            that differ.
    """

    def __init__(
        self,
        distiller: dict,
        teacher: Any,
        teacher_ckpt: str | None = None,
        teacher_norm_eval: bool = True,
        teacher_speed: str = 'fold',
        teacher_trainable: bool = False,
        teacher_cache: str | None = None,
        student_loss_weight: float = 1.0,
        teacher_sha256: str | Sequence[str] | None = None,
        teacher_sharding: bool = False,
        **kwargs: Any,
    ) -> None:
        if teacher_trainable:
            raise ValueError(
                'WSLDistill keeps its teacher frozen, got teacher_trainable=True. Use '
                "MMRazor's SingleTeacherDistill for a teacher that learns"
            )
        check_speed(teacher_speed)
        _check_student_loss_weight(student_loss_weight, kwargs.get('calculate_student_loss', True))
        cached = CachedTeacher(teacher_cache) if teacher_cache else None
        # written to the student's checkpoint; empty if the teacher's files are unknown
        self.teacher_sha256 = check_files(teacher_files(teacher, teacher_ckpt), teacher_sha256, required=not cached)
        # set before the base class runs `self.teacher = ...`, which then changes nothing
        self.frozen_teacher = FrozenTeacher(
            cached or _built(teacher), teacher_norm_eval, 'plain' if cached else teacher_speed, teacher_sharding
        )
        super().__init__(
            cached.with_recorders(distiller) if cached else distiller,
            self.teacher,
            teacher_norm_eval=teacher_norm_eval,
            **kwargs,
        )
        self.student_loss_weight = student_loss_weight
        check_settings(kwargs.get('architecture'), self.student, self.data_preprocessor)
        keep_batch_augments(self.student, self.data_preprocessor)
        if hasattr(self.distiller, 'check_targets'):
            self.distiller.check_targets(self.student, self.data_preprocessor)
        if cached:
            cached.check(teacher, teacher_ckpt, teacher_norm_eval, self.data_preprocessor)
            cached.prepare_for_losses(self.distiller)
        else:
            _load_teacher(self.teacher, teacher, teacher_ckpt)
            self.frozen_teacher.use_inputs_of(self.data_preprocessor, _names_its_inputs(teacher))
        self._register_load_state_dict_pre_hook(_drop_teacher_weights)
        self.data_preprocessor.register_forward_pre_hook(send_batch)
        self.register_forward_pre_hook(_prepare_step, with_kwargs=True)
        self.train(self.training)

    @property
    def teacher(self) -> BaseModel:
        """The teacher's network."""
        return self.frozen_teacher.network

    @property
    def teacher_speed(self) -> str:
        """How the teacher runs, one of :data:`mmwsl.models.teachers.fast.SPEEDS`."""
        return self.frozen_teacher.speed

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a network assigned to ``teacher`` replaces the teacher and does not become a submodule."""
        if name == 'teacher':
            if value is not self.teacher:
                self._replace_teacher(value)
            return
        super().__setattr__(name, value)
        if name == 'distiller':
            self.frozen_teacher.is_read_by(value.teacher_recorders, value.deliveries)

    def _replace_teacher(self, network: BaseModel) -> None:
        """Replace the teacher by another network, with the same recorders, this model's device and its own input."""
        if isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                'a cached teacher cannot be replaced, because the samples come with its answers: build the '
                'model without teacher_cache, with the other network as teacher'
            )
        replaced = self.frozen_teacher
        teacher = FrozenTeacher(network, self.teacher_norm_eval, self.teacher_speed, replaced.sharding)
        if not teacher.is_sharded:
            teacher.network.to(next(self.parameters()).device)
        self.distiller.prepare_from_teacher(teacher.network)
        teacher.is_read_by(self.distiller.teacher_recorders, self.distiller.deliveries)
        teacher.use_inputs_of(self.data_preprocessor)
        replaced.release()
        self.frozen_teacher = teacher
        self.teacher_sha256 = []  # the new teacher is not from these files
        teacher.train(self.training)

    def init_weights(self) -> None:
        """Initialise the student, and the teacher if it has no checkpoint."""
        super().init_weights()
        if not self.teacher.is_init:
            self.teacher.init_weights()

    def loss(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None) -> dict[str, Tensor]:
        """Return the student's losses as ``student.*``, and the distiller's losses and statistics as ``distill.*``."""
        if torch.compiler.is_compiling():
            tell_of_breaks(
                self.distiller.student_recorders, self.distiller.teacher_recorders, self.distiller.deliveries
            )
        if self._is_taught():
            self.frozen_teacher(batch_inputs, data_samples)
        self.distiller.set_deliveries_override(True)
        learns = self.calculate_student_loss or self.student_trainable
        with (
            recording(self.distiller.student_recorders, self.distiller.deliveries),
            torch.set_grad_enabled(learns and torch.is_grad_enabled()),
        ):
            student_losses = self.student(batch_inputs, data_samples, mode='loss')
        losses = add_prefix(self._weighted(student_losses), 'student') if self.calculate_student_loss else {}
        if not self.distillation_stopped:
            losses.update(add_prefix(self.distiller.compute_distill_losses(), 'distill'))
        return losses

    def _is_taught(self) -> bool:
        return not self.distillation_stopped or bool(self.distiller.deliveries.deliveries)

    def _weighted(self, student_losses: dict[str, Any]) -> dict[str, Any]:
        """Scale the values that mmengine sums: tensors or lists of tensors with 'loss' in their key."""
        factor = self.student_loss_weight
        if factor == 1:
            return student_losses
        return {
            key: value
            if 'loss' not in key
            else factor * value
            if isinstance(value, Tensor)
            else [factor * part for part in value]
            for key, value in student_losses.items()
        }

    def teacher_logits(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None) -> Tensor:
        """Return the logits that a loss receives as ``preds_T``. Shape: (N, C)."""
        self.frozen_teacher(batch_inputs, data_samples)
        return self.distiller.get_record('logits', from_student=False)

    def train(self, mode: bool = True) -> WSLDistill:
        """Set the student's mode; the teacher stays in eval mode, except BatchNorm with teacher_norm_eval=False.

        This also hooks recorders again into modules that were replaced: each epoch calls it, after ``sync_bn``.
        """
        nn.Module.train(self, mode)
        hook_again(self.distiller.student_recorders, self.student)
        self.frozen_teacher.train(mode)
        return self

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Return the depth of a parameter's layer in the student and its number of layers, for ``layer_decay_rate``.

        Raises:
            NotImplementedError: If the student has no ``get_layer_depth``.
        """
        try:
            return self.student.get_layer_depth(param_name.removeprefix(STUDENT))
        except (AttributeError, NotImplementedError) as error:
            backbone = type(getattr(self.student, 'backbone', self.student)).__name__
            raise NotImplementedError(
                f'layer_decay_rate needs a student with get_layer_depth(), which its {backbone} lacks: remove it from '
                'optim_wrapper.paramwise_cfg'
            ) from error

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> WSLDistill:
        super()._apply(fn, *args, **kwargs)
        if not self.frozen_teacher.is_sharded:  # it moves in shards, with the first batch
            self.teacher._apply(fn, *args, **kwargs)
        return self


def _check_student_loss_weight(weight: float, calculate_student_loss: bool) -> None:
    if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
        raise ValueError(f'student_loss_weight should be a finite number of at least 0, got {weight!r}')
    if weight != 1 and not calculate_student_loss:
        raise ValueError(
            f"student_loss_weight={weight} scales the student's own losses, which "
            'calculate_student_loss=False leaves out: set only one of the two'
        )


def _built(teacher: Any) -> Any:
    """Build the teacher without advancing the random state, so that a student starts from the same weights with any
    teacher, live or cached."""
    with torch.random.fork_rng(devices=[]):
        return RAZOR_MODELS.build(teacher) if isinstance(teacher, dict) else teacher


def _load_teacher(network: BaseModel, config: Any, checkpoint: str | None) -> None:
    """Load a teacher strictly, and mark it as initialised if it has weights."""
    init_cfg = network.init_cfg
    if checkpoint is None and isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        checkpoint = init_cfg['checkpoint']
    if checkpoint is not None:
        load_network(network, checkpoint)
    elif isinstance(config, dict) and not config.get('pretrained') and not network.is_init:
        warnings.warn(
            'teacher_ckpt is None: the teacher is untrained, and a student learns nothing from it. Set '
            'model.teacher_ckpt to its checkpoint',
            UserWarning,
            stacklevel=3,
        )
        return
    network.is_init = True


def _names_its_inputs(teacher: Any) -> bool:
    """Whether a config, here or in another package, sets the teacher's data_preprocessor."""
    if not isinstance(teacher, dict):
        return False
    external = get_config(teacher['cfg_path']) if 'cfg_path' in teacher else {}
    return any(config.get('data_preprocessor') is not None for config in (teacher, external, external.get('model', {})))


@torch.compiler.disable
def _prepare_step(model: WSLDistill, args: tuple, kwargs: dict) -> None:
    """Do what torch.compile cannot trace before a step, outside the graph, so that ``forward`` is one graph."""
    given = {**dict(zip(('inputs', 'data_samples', 'mode'), args, strict=False)), **kwargs}
    if given.get('mode') != 'loss':
        return
    if model._is_taught():
        model.frozen_teacher.prepare(given['inputs'], given.get('data_samples'))
    for loss in model.distiller.distill_losses.values():
        if isinstance(loss, WeightedLoss):
            loss.prepare()


def _drop_teacher_weights(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Skip the teacher in a checkpoint of MMRazor's SingleTeacherDistill, and refuse a checkpoint without a student.

    mmengine does not load strictly: it would load nothing from the file of a single network, and train from scratch.
    """
    for key in [key for key in state_dict if key.startswith(f'{prefix}teacher.')]:
        del state_dict[key]
    if state_dict and not any(key.startswith(prefix + STUDENT) for key in state_dict):
        raise ValueError(
            f'the checkpoint holds no student: none of its keys begins with {STUDENT!r} (the first is '
            f'{next(iter(state_dict))!r}). load_from and --resume need a checkpoint of a distillation; to '
            'start a student from the file of a single network, set model.architecture.init_cfg='
            "dict(type='Pretrained', checkpoint=...)"
        )
