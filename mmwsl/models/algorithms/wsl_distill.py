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
from mmwsl.models.losses import WeightedLoss
from mmwsl.models.teachers import CachedTeacher, FrozenTeacher
from mmwsl.models.teachers.fast import check_speed
from mmwsl.models.teachers.recording import hook_again, recording, tell_of_breaks
from mmwsl.registry import MODELS
from mmwsl.utils.checkpoint import STUDENT, check_files, load_network
from mmwsl.utils.data import send_batch


@MODELS.register_module()
class WSLDistill(SingleTeacherDistill):
    """Distil a frozen teacher into a student, over MMRazor's SingleTeacherDistill.

    The teacher is a :class:`mmwsl.models.teachers.FrozenTeacher`, ``model.frozen_teacher``: eval mode (dropout and
    drop-path too), no gradient, no loss of its own. Its network, ``model.teacher``, follows the model's device but is
    no part of it: no checkpoint, optimiser, DistributedDataParallel or FSDP sees it. Each process has it whole, unless
    teacher_sharding is set.
    Resuming reads it from ``teacher_ckpt`` again. Assigning another network to ``model.teacher`` teaches with that one
    from then on.

    Args:
        distiller: Config of the distiller, e.g. ``dict(type='mmwsl.WSLDistiller')``.
        teacher: Config of the teacher (``dict(cfg_path='mmpretrain::...', pretrained=True)`` takes a model and its
            weights from another package, as ``architecture`` does, too), or the built network. With a data_preprocessor
            of its own it sees its own kind of input (mean, std, channel order).
        teacher_ckpt: Its checkpoint, loaded strictly. None builds an untrained teacher, with a warning, unless the
            teacher loads its weights itself, as an EnsembleTeacher does.
        teacher_sha256: SHA-256 of that file (``sha256sum FILE``), or of an ensemble's files a list; eight digits are
            enough. A file that is another stops the run. None only logs it.
        teacher_norm_eval: False lets its BatchNorm predict with batch statistics while the student trains, as the
            authors' code does; its running statistics stay as loaded either way.
        teacher_speed: How it runs while training reads nothing but its output. 'fold': BatchNorm folded into the
            convolutions (not with ``teacher_norm_eval=False``) and weights laid out channels last, both only where
            logits stay the same to 1e-4 of the largest. 'bf16': that, in bfloat16; logits change by per cents.
            'compile': folded and compiled by torch, which takes its time on the first batch. 'compile_bf16': all of
            it. 'plain': as it is, as also whenever a recorder, delivery or hook reads inside it.
        teacher_cache: Folder that tools/cache_teacher.py filled with this teacher's answers. The network is then not
            built, and ``teacher`` and ``teacher_ckpt`` say which teacher it should be. Needs the dataset
            ``mmwsl.CachedViews`` over the same folder.
        teacher_sharding: True splits the teacher over the processes of a run, whatever strategy trains the student, so
            each holds its part and gathers a layer when it is needed. For a teacher that is too large for one GPU;
            it then runs as with ``teacher_speed='plain'``. In a single process it stays whole.
        student_loss_weight: Factor of the student's own losses, logged as they are summed: 0.1 in Hinton's recipe
            0.1 CE + 0.9 tau^2 KL. What the student only logs stays as it is.
        kwargs: As of SingleTeacherDistill: ``architecture`` (the student), ``data_preprocessor``,
            ``student_trainable``, ``calculate_student_loss``, ``init_cfg`` and so on.

    Raises:
        ValueError: If the checkpoint does not fit the teacher, ``teacher_trainable`` is asked for, teacher_speed is
            none of these, the teacher's file is another than teacher_sha256, or student_loss_weight is negative, not
            finite, or of losses that are not calculated; if the architecture names a data_preprocessor other than the
            algorithm's, which prepares its images; or where a cached teacher cannot give what the losses need.
        CacheError: If the cache is missing, unfinished, damaged, or of another teacher; the fields are named.
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
                'WSLDistill keeps its teacher frozen, got teacher_trainable=True. MMRazor has '
                'SingleTeacherDistill for a teacher that learns'
            )
        check_speed(teacher_speed)
        _check_student_loss_weight(student_loss_weight, kwargs.get('calculate_student_loss', True))
        cached = CachedTeacher(teacher_cache) if teacher_cache else None
        # of its files, for the student's checkpoint; empty if they are not known
        self.teacher_sha256 = check_files(teacher_files(teacher, teacher_ckpt), teacher_sha256, required=not cached)
        # before the base class, whose `self.teacher = ...` then changes nothing
        self.frozen_teacher = FrozenTeacher(
            cached or _built(teacher), teacher_norm_eval, 'plain' if cached else teacher_speed, teacher_sharding
        )
        super().__init__(
            cached.recorded_by(distiller) if cached else distiller,
            self.teacher,
            teacher_norm_eval=teacher_norm_eval,
            **kwargs,
        )
        self.student_loss_weight = student_loss_weight
        _check_one_preprocessor(kwargs.get('architecture'), self.student, self.data_preprocessor)
        self._keep_batch_augments()
        if hasattr(self.distiller, 'check_targets'):
            self.distiller.check_targets(self.student, self.data_preprocessor)
        if cached:
            cached.check(teacher, teacher_ckpt, teacher_norm_eval, self.data_preprocessor)
            cached.serve(self.distiller)
        else:
            _load_teacher(self.teacher, teacher, teacher_ckpt)
            self.frozen_teacher.share_inputs(self.data_preprocessor, _names_its_inputs(teacher))
        self._register_load_state_dict_pre_hook(_keep_student)
        self.data_preprocessor.register_forward_pre_hook(send_batch)
        self.register_forward_pre_hook(_prepare_step, with_kwargs=True)
        self.train(self.training)

    @property
    def teacher(self) -> BaseModel:
        """The teacher's network."""
        return self.frozen_teacher.network

    @property
    def teacher_speed(self) -> str:
        """How the teacher runs."""
        return self.frozen_teacher.speed

    def __setattr__(self, name: str, value: Any) -> None:
        """As of a module, but a network assigned to ``teacher`` replaces the teacher's, and is no submodule either."""
        if name == 'teacher':
            if value is not self.teacher:
                self._replace_teacher(value)
            return
        super().__setattr__(name, value)
        if name == 'distiller':
            self.frozen_teacher.is_read_by(value.teacher_recorders, value.deliveries)

    def _replace_teacher(self, network: BaseModel) -> None:
        """Teach with another network: frozen, on this model's device, with the recorders and its own kind of input."""
        if isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                'a cached teacher cannot be replaced, because the images come with its records: build the '
                'model without teacher_cache, with the other network as teacher'
            )
        replaced = self.frozen_teacher
        teacher = FrozenTeacher(network, self.teacher_norm_eval, self.teacher_speed, replaced.sharding)
        if not teacher.is_sharded:
            teacher.network.to(next(self.parameters()).device)
        self.distiller.prepare_from_teacher(teacher.network)
        teacher.is_read_by(self.distiller.teacher_recorders, self.distiller.deliveries)
        teacher.share_inputs(self.data_preprocessor)
        replaced.release()
        self.frozen_teacher = teacher
        self.teacher_sha256 = []  # it is not of these files
        teacher.train(self.training)

    def _keep_batch_augments(self) -> None:
        """Mix as the student's ``train_cfg`` says, though its preprocessor gives way to the algorithm's."""
        own: Any = getattr(self.student, 'data_preprocessor', None)
        shared: Any = self.data_preprocessor
        augments = getattr(own, 'batch_augments', None)
        if augments is not None and getattr(shared, 'batch_augments', None) is None:
            if not hasattr(shared, 'batch_augments'):
                raise ValueError(
                    "the student's train_cfg mixes images, and the algorithm's data_preprocessor, a "
                    f'{type(shared).__name__}, cannot: take mmpretrain.ClsDataPreprocessor'
                )
            shared.batch_augments = augments
            if hasattr(shared, 'to_onehot'):  # mmpretrain's mix labels, too
                shared.to_onehot, shared.num_classes = True, shared.num_classes or own.num_classes

    def init_weights(self) -> None:
        """Initialise the student, and a teacher that has no checkpoint."""
        super().init_weights()
        if not self.teacher.is_init:
            self.teacher.init_weights()

    def loss(self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None) -> dict[str, Tensor]:
        """The student's losses under ``student.``, the distiller's losses and statistics under ``distill.``."""
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
        """With the factor on those that mmengine sums: tensors or lists of tensors, with 'loss' in their key."""
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
        """What a loss is given as ``preds_T``. Shape: (N, C)."""
        self.frozen_teacher(batch_inputs, data_samples)
        return self.distiller.get_record('logits', from_student=False)

    def train(self, mode: bool = True) -> WSLDistill:
        """Set the student's mode; the teacher stays in eval mode, but for BatchNorm with teacher_norm_eval=False.

        Recorders find their modules again here: each epoch begins with it, and ``sync_bn`` comes before it.
        """
        nn.Module.train(self, mode)
        hook_again(self.distiller.student_recorders, self.student)
        self.frozen_teacher.train(mode)
        return self

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Return the depth of a parameter's layer in the student and its number of layers, for ``layer_decay_rate``.

        Raises:
            NotImplementedError: If the student does not know it.
        """
        try:
            return self.student.get_layer_depth(param_name.removeprefix(STUDENT))
        except (AttributeError, NotImplementedError) as error:
            backbone = type(getattr(self.student, 'backbone', self.student)).__name__
            raise NotImplementedError(
                f'layer_decay_rate needs a student that knows how deep its layers are '
                f'(get_layer_depth), and its {backbone} does not: leave it out of '
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
            f"student_loss_weight={weight} scales the student's own losses, and "
            'calculate_student_loss=False leaves them out: set only one of the two'
        )


def _check_one_preprocessor(architecture: Any, student: Any, shared: Any) -> None:
    """Raise ValueError for settings of the student's data_preprocessor that the algorithm's puts out of use."""
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
            "the config's data_preprocessor prepares the images, and has other values. Set them there, "
            'and delete them in model.architecture'
        )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def _mixing(preprocessor: Any) -> Any:
    """What mixes a batch's images, in a form that can be compared; None if nothing does."""
    augments = getattr(preprocessor, 'batch_augments', None)
    return augments and (  # mmdet's are a list
        [(type(part).__name__, getattr(part, '__dict__', None)) for part in getattr(augments, 'augments', augments)],
        getattr(augments, 'probs', None),
    )


def _built(teacher: Any) -> Any:
    """The network. What it draws changes nothing: a student begins alike whoever teaches it, live or from a cache."""
    with torch.random.fork_rng(devices=[]):
        return RAZOR_MODELS.build(teacher) if isinstance(teacher, dict) else teacher


def _load_teacher(network: BaseModel, config: Any, checkpoint: str | None) -> None:
    """Load a teacher strictly, and mark as initialised what has weights."""
    init_cfg = network.init_cfg
    if checkpoint is None and isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        checkpoint = init_cfg['checkpoint']
    if checkpoint is not None:
        load_network(network, checkpoint)
    elif isinstance(config, dict) and not config.get('pretrained') and not network.is_init:
        warnings.warn(
            'teacher_ckpt is None: the teacher is untrained, and a student learns nothing from it. Name '
            'its checkpoint in model.teacher_ckpt',
            UserWarning,
            stacklevel=3,
        )
        return
    network.is_init = True


def _names_its_inputs(teacher: Any) -> bool:
    """Whether a config, here or in another package, says what the teacher's input is."""
    if not isinstance(teacher, dict):
        return False
    external = get_config(teacher['cfg_path']) if 'cfg_path' in teacher else {}
    return any(config.get('data_preprocessor') is not None for config in (teacher, external, external.get('model', {})))


@torch.compiler.disable
def _prepare_step(model: WSLDistill, args: tuple, kwargs: dict) -> None:
    """Do before a step what torch.compile cannot trace, and break its graph here, so that ``forward`` is whole."""
    given = {**dict(zip(('inputs', 'data_samples', 'mode'), args, strict=False)), **kwargs}
    if given.get('mode') != 'loss':
        return
    if model._is_taught():
        model.frozen_teacher.prepare(given['inputs'], given.get('data_samples'))
    for loss in model.distiller.distill_losses.values():
        if isinstance(loss, WeightedLoss):
            loss.prepare()


def _keep_student(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Skip the teacher in a checkpoint of MMRazor's SingleTeacherDistill, and refuse one without a student.

    mmengine loads loosely: from a network's own file it would take nothing, and a run would go on untrained.
    """
    for key in [key for key in state_dict if key.startswith(f'{prefix}teacher.')]:
        del state_dict[key]
    if state_dict and not any(key.startswith(prefix + STUDENT) for key in state_dict):
        raise ValueError(
            f'the checkpoint holds no student: none of its keys begins with {STUDENT!r} (the first is '
            f'{next(iter(state_dict))!r}). load_from and --resume take checkpoints of a distillation; to '
            "start a student from a network's own file, set model.architecture.init_cfg="
            "dict(type='Pretrained', checkpoint=...)"
        )
