from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import RecorderManager
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmwsl.models.distillers.detectors import LOSSES, Detector, check_alike, detector, is_detector
from mmwsl.models.distillers.segmentors import RESOLUTIONS, Segmentor, check_classes, is_segmentor, segmentor
from mmwsl.models.distillers.wiring import (
    HARD_LOSS,
    LOGITS,
    LOW,
    MAPPINGS,
    SAMPLES,
    check_targets,
    mappings_for,
    student_recorder,
    teacher_recorder,
)
from mmwsl.models.losses import Call, WeightedLoss
from mmwsl.models.teachers import CachedTeacher
from mmwsl.registry import MODELS

NOT_CACHED = (
    'a teacher cache holds one answer for each image, and segmentors and detectors need one for each pixel or '
    'anchor: run the teacher live (without model.teacher_cache)'
)


@MODELS.register_module()
class WSLDistiller(ConfigurableDistiller):
    """A ConfigurableDistiller with default wiring for mmpretrain's classifiers, mmseg's segmentors and mmdet's dense
    detectors.

    It records the student's logits and targets where the head passes them to its loss (so targets are mixed or smoothed
    as the student sees them), and the output of the teacher's head. Each loss receives the arguments that its
    ``forward`` names: ``preds_S``, ``preds_T``, ``gt_labels``, or other names that are usual in the field. Any logit
    loss of MMRazor fits.

    A segmentor is distilled at its decode head: the last one of a cascade, and the first of several losses; auxiliary
    heads learn from labels alone. The teacher's logits are resized as that head resizes its own, and the losses use the
    head's ``ignore_index``. A detector is distilled at the class scores and targets of all anchors that its head trains
    on; the teacher assigns no boxes. There, a loss with reduction 'mean' divides by the student's positives, averaged
    over processes, whatever its ``average``.

    Args:
        distill_losses: Configs of the losses by name. Defaults to ``loss_wsl=dict(type='mmwsl.WSLLoss')``, and for
            detectors to one of :data:`mmwsl.models.distillers.detectors.LOSSES`.
        student_recorders: Recorders to add, or to replace ``hard_loss``.
        teacher_recorders: Recorders to add, or to replace ``logits``.
        loss_forward_mappings: Mappings of those losses that do not use the default wiring.
        resolution: Resolution at which segmentors are compared: that of the labels ('label') or of the student's logits
            ('logits'), which takes a fraction of the memory.
        kwargs: ``distill_deliveries``, ``connectors`` and ``init_cfg`` of the ConfigurableDistiller.

    Raises:
        ValueError: When the model is built, if a recorder finds nothing, an argument of a loss has no recorder, a loss
            would not be trained on because its name has no 'loss', or it is not defined for the student's head or for
            labels that the preprocessor mixes.
    """

    def __init__(
        self,
        distill_losses: dict | None = None,
        student_recorders: dict | None = None,
        teacher_recorders: dict | None = None,
        loss_forward_mappings: dict | None = None,
        resolution: str = 'label',
        **kwargs: Any,
    ) -> None:
        if resolution not in RESOLUTIONS:
            raise ValueError(f'resolution should be one of {RESOLUTIONS}, got {resolution!r}')
        self._names_losses = bool(distill_losses)
        distill_losses = distill_losses or {'loss_wsl': dict(type='mmwsl.WSLLoss')}
        _check_names(distill_losses)
        # as in MMRazor's own configs, a type without a scope is MMRazor's, whatever the run's default_scope
        with DefaultScope.overwrite_default_scope('mmrazor'):
            super().__init__(distill_losses=distill_losses, **kwargs)
            self._own_recorders = {*(student_recorders or {}), *(teacher_recorders or {})}
            needs_samples = any(getattr(loss, 'needs_data_samples', False) for loss in self.distill_losses.values())
            self.student_recorders = RecorderManager(
                {
                    HARD_LOSS: dict(type='ModuleInputs', source='head.loss_module'),
                    **({SAMPLES: dict(type='ModuleInputs', source='')} if needs_samples else {}),
                    **(student_recorders or {}),
                }
            )
            self.teacher_recorders = RecorderManager(
                {LOGITS: dict(type='ModuleOutputs', source='head'), **(teacher_recorders or {})}
            )
        given = loss_forward_mappings or {}
        recorders = {*self.student_recorders.recorders, *self.teacher_recorders.recorders}
        mappings = {
            name: mappings_for(name, loss, recorders, given.get(name, {})) for name, loss in self.distill_losses.items()
        }
        self._check_loss_forward_mappings(
            self.distill_losses, {**given, **mappings}, self.student_recorders, self.teacher_recorders
        )
        self.loss_forward_mappings = mappings
        self.resolution = resolution
        self.segmentor: Segmentor | None = None
        """What the losses have to know about the student, if it is a segmentor."""
        self.detector: Detector | None = None
        """What the losses have to know about the student, if it is a detector."""
        self.logs_statistics = True
        """Whether to compute the next batch's statistics; ``mmwsl.LossStatisticsHook`` requests only those it logs."""
        self.calls: dict[str, Call] = {}
        """The last call of each weighted loss, by the loss's name."""

    @property
    def is_dense(self) -> bool:
        """Whether the student scores pixels or anchors."""
        return self.segmentor is not None or self.detector is not None

    def prepare_from_student(self, model: BaseModel) -> None:
        """Hook the recorders into the student, or raise ValueError."""
        if HARD_LOSS not in self._own_recorders and self._is_read(HARD_LOSS):
            if is_segmentor(model):
                self._prepare_from_segmentor(model)
            elif is_detector(model):
                self._prepare_from_detector(model)
            else:
                _put(self.student_recorders, HARD_LOSS, student_recorder(model))
        elif is_detector(model) and HARD_LOSS not in self._own_recorders:  # only layers are compared
            del self.student_recorders.recorders[HARD_LOSS]
        with _explained('student', model):
            super().prepare_from_student(model)

    def _prepare_from_segmentor(self, model: nn.Module) -> None:
        found = self.segmentor = segmentor(model, self.resolution)
        _put(self.student_recorders, HARD_LOSS, dict(type='mmrazor.ModuleInputs', source=found.loss))
        if self.resolution == 'logits':
            low = dict(type='mmrazor.ModuleOutputs', source=found.logits)
            self.student_recorders.recorders[LOW] = RecorderManager({LOW: low}).get_recorder(LOW)
        for name, loss in self.distill_losses.items():
            if isinstance(loss, WeightedLoss) and self._is_at_the_head(name):
                loss.ignore_index = found.ignore_index

    def _prepare_from_detector(self, model: nn.Module) -> None:
        found = self.detector = detector(model)
        _put(self.student_recorders, HARD_LOSS, dict(type='mmwsl.NamedInputs', source=found.loss))
        if not self._names_losses:
            self.distill_losses['loss_wsl'] = MODELS.build(LOSSES[found.is_sigmoid])

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Hook the recorders into the teacher, or raise ValueError."""
        if self.is_dense and isinstance(model, CachedTeacher):
            raise ValueError(NOT_CACHED)
        if LOGITS not in self._own_recorders:
            if self.segmentor is not None and not len(self.connectors):
                check_classes(self.segmentor, model)
            if self.detector is not None and not len(self.connectors):
                check_alike(self.detector, model)
            _put(self.teacher_recorders, LOGITS, teacher_recorder(model))
        with _explained('teacher', model):
            super().prepare_from_teacher(model)

    def check_targets(self, student: nn.Module, data_preprocessor: Any) -> None:
        """Raise ValueError if a loss is not defined for the student's head, or for labels that are mixed."""
        for name, loss in self.distill_losses.items():
            if isinstance(loss, WeightedLoss) and self._is_at_the_head(name):
                check_targets(name, loss, student, data_preprocessor)

    def compute_distill_losses(self) -> dict[str, Tensor]:
        """Return the losses and, with ``logs_statistics``, their statistics, which are logged but not summed."""
        results, statistics, self.calls = {}, {}, {}
        anchors = self._anchors()
        for position, name in enumerate(self.loss_forward_mappings, 1):
            loss = self.distill_losses[name]
            results[name] = loss(**self._arguments(name, anchors))
            if isinstance(loss, WeightedLoss):
                self.calls[name] = loss.last_call  # type: ignore[assignment]  # at once: a shared loss may be called again
            for statistic, value in (self._statistics(name) if self.logs_statistics else {}).items():
                statistics[f'{statistic}_{position}' if statistic in statistics else statistic] = value
            if name in self.calls:
                self.calls[name].release()
        for recorder in self.student_recorders.recorders.values():
            recorder.data_buffer[:] = tree_map(_without_graph, recorder.data_buffer)
        return {**results, **statistics}

    def _anchors(self) -> dict[str, Any]:
        """Arguments that a detector's losses take from its anchors; empty for other networks."""
        if self.detector is None:
            return {}
        calls = self.student_recorders.get_recorder(HARD_LOSS).data_buffer
        return self.detector.match(calls, self.get_record(**MAPPINGS['preds_T']))

    def _arguments(self, name: str, anchors: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a loss."""
        mappings, loss = self.loss_forward_mappings[name], self.distill_losses[name]
        found = {
            argument: anchors[role]
            for argument, mapping in mappings.items()
            for role in anchors
            if MAPPINGS.get(role) == mapping
        }
        if isinstance(loss, WeightedLoss) and loss.reduction == 'mean' and 'preds_S' in found:
            found['avg_factor'] = anchors['avg_factor']
        values = {
            argument: self.get_record(**mapping) for argument, mapping in mappings.items() if argument not in found
        }
        return {**found, **self._matched(mappings, values)}

    def _matched(self, mappings: dict[str, dict], values: dict[str, Any]) -> dict[str, Any]:
        """A segmentor's arguments at one resolution; those of other networks unchanged."""
        if self.segmentor is None:
            return values
        found = {
            role: argument for argument, mapping in mappings.items() for role in MAPPINGS if mapping == MAPPINGS[role]
        }
        if not {'preds_S', 'preds_T'} <= found.keys():
            return values
        preds_S = values[found['preds_S']]
        if self.resolution == 'logits':
            preds_S = self.get_record(LOW, from_student=True)
        labels = self.get_record(**MAPPINGS['gt_labels'])
        matched = self.segmentor.match(preds_S, values[found['preds_T']], labels)
        return {**values, **{argument: matched[role] for role, argument in found.items() if role in matched}}

    def _is_at_the_head(self, name: str) -> bool:
        """Whether a loss receives the logits of the student's head."""
        return self.loss_forward_mappings[name].get('preds_S') == MAPPINGS['preds_S']

    def _statistics(self, name: str) -> dict[str, Tensor]:
        """Statistics of a loss's last call, prefixed with its recorder's name unless that reads the student's head."""
        recorder = self.loss_forward_mappings[name].get('preds_S', MAPPINGS['preds_S'])['recorder']
        prefix = '' if recorder == HARD_LOSS else f'{recorder}.'
        # getattr is for a user's own loss; on ours torch.compile would compute the statistics at each step
        found = (
            self.calls[name].statistics()
            if name in self.calls
            else getattr(self.distill_losses[name], 'statistics', {})
        )
        # mmengine sums whatever has 'loss' in its name
        return {f'{prefix}{statistic}'.replace('loss', 'logits'): value for statistic, value in found.items()}

    def _is_read(self, recorder: str) -> bool:
        """Whether a loss reads a recorder."""
        return any(
            mapping['recorder'] == recorder
            for mappings in self.loss_forward_mappings.values()
            for mapping in mappings.values()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'calls': {}}  # type: ignore[misc]  # they belong to a batch


def _without_graph(value: Any) -> Any:
    """Detach a tensor, so that the model can be copied after a step; parameters, which have no graph, are kept."""
    return value.detach() if isinstance(value, Tensor) and not value.is_leaf else value


def _put(manager: RecorderManager, name: str, config: dict) -> None:
    """Replace the recorder of this name, unless its source stays the same: it may be hooked into a network already."""
    if manager.get_recorder(name).source != config['source']:
        manager.recorders[name] = RecorderManager({name: config}).get_recorder(name)


def _check_names(losses: dict) -> None:
    for name in losses:
        if 'loss' not in name:
            raise ValueError(
                f'distill_losses has {name!r}, which would be logged but not trained on: mmengine sums '
                f"the values that have 'loss' in their name. Rename it to 'loss_{name}'"
            )


@contextmanager
def _explained(who: str, network: nn.Module) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:  # of a recorder whose source does not exist
        raise ValueError(
            f'a recorder of the {who} finds nothing: {error} The {who} is a {type(network).__name__} with '
            f'{[name for name, _ in network.named_children()]}. Name one of its modules in {who}_recorders of '
            "model.distiller; '' is the network itself"
        ) from error
