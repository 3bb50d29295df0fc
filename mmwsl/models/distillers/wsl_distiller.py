from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmpretrain.models.heads import ClsHead, MultiLabelClsHead
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import RecorderManager
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmwsl.models.losses import Call, WeightedLoss
from mmwsl.registry import MODELS

STUDENT_RECORDERS = {'hard_loss': dict(type='ModuleInputs', source='head.loss_module')}
TEACHER_RECORDERS = {'logits': dict(type='ModuleOutputs', source='head')}
# The images' data samples, for weightings that look images up.
SAMPLES_RECORDER = {'samples': dict(type='ModuleInputs', source='')}
# Where a logit loss finds each of its arguments, under the names that MMRazor gives them.
RECORDS = {
    'preds_S': dict(recorder='hard_loss', from_student=True, data_idx=0),
    'preds_T': dict(recorder='logits', from_student=False),
    'gt_labels': dict(recorder='hard_loss', from_student=True, data_idx=1),
    'teacher_hard_loss': dict(recorder='teacher_hard_loss', from_student=False),  # of a teacher cache that is not exact
    'data_samples': dict(recorder='samples', from_student=True, data_idx=1),
}


@MODELS.register_module()
class WSLDistiller(ConfigurableDistiller):
    """A ConfigurableDistiller that is already wired for mmpretrain's classifiers.

    It records the student's logits and targets where the head hands them to its loss (so mixed or smoothed targets are
    seen as the student sees them), and what the teacher's head puts out. Each loss is given the records that its
    ``forward`` names: ``preds_S``, ``preds_T``, ``gt_labels``. Any logit loss of MMRazor fits.

    Args:
        distill_losses: Configs of the losses by name. Defaults to ``loss_wsl=dict(type='mmwsl.WSLLoss')``.
        student_recorders: Recorders to add, or to put in place of ``hard_loss``.
        teacher_recorders: Recorders to add, or to put in place of ``logits``. A teacher without a ``head`` takes
            ``dict(logits=dict(type='ModuleOutputs', source=''))``: the output of the whole network.
        loss_forward_mappings: Mappings of the losses that are wired otherwise.
        kwargs: ``distill_deliveries``, ``connectors`` and ``init_cfg`` of the ConfigurableDistiller.

    Raises:
        ValueError: When the model is built: if a recorder finds nothing, or a loss is not defined for the student's
            head or for labels that the preprocessor mixes.
    """

    def __init__(self, distill_losses: dict | None = None, student_recorders: dict | None = None,
                 teacher_recorders: dict | None = None, loss_forward_mappings: dict | None = None,
                 **kwargs: Any) -> None:
        # as in MMRazor's own configs, a type without a scope is MMRazor's, whatever default_scope the run has
        with DefaultScope.overwrite_default_scope('mmrazor'):
            super().__init__(
                distill_losses=distill_losses or {'loss_wsl': dict(type='mmwsl.WSLLoss')},
                teacher_recorders={**TEACHER_RECORDERS, **(teacher_recorders or {})}, **kwargs)
            looked_up = any(getattr(loss, 'needs_data_samples', False) for loss in self.distill_losses.values())
            self.student_recorders = RecorderManager(
                {**STUDENT_RECORDERS, **(SAMPLES_RECORDER if looked_up else {}), **(student_recorders or {})})
        mappings = {name: self._records_for(loss) for name, loss in self.distill_losses.items()}
        mappings.update(loss_forward_mappings or {})
        self._check_loss_forward_mappings(self.distill_losses, mappings, self.student_recorders,
                                          self.teacher_recorders)
        self.loss_forward_mappings = mappings
        self.logs_statistics = True
        """Whether the next batch's statistics are computed; ``mmwsl.LossStatisticsHook`` asks for those it logs."""
        self.calls: dict[str, Call] = {}
        """What each weighted loss knew of the last batch's targets, by the loss's name."""

    def prepare_from_student(self, model: BaseModel) -> None:
        """Find what is recorded in the student, or raise ValueError."""
        with _explained('student', model):
            super().prepare_from_student(model)

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Find what is recorded in the teacher, or raise ValueError."""
        with _explained('teacher', model):
            super().prepare_from_teacher(model)

    def check_targets(self, student: nn.Module, data_preprocessor: nn.Module) -> None:
        """Raise ValueError for a loss that is not defined for a student's head, or for labels that are mixed."""
        for name, loss in self.distill_losses.items():
            if isinstance(loss, WeightedLoss) and self._is_wired_by_type(name):
                _check_head(name, loss, getattr(student, 'head', None))
                _check_mixing(name, loss, getattr(data_preprocessor, 'batch_augments', None))

    def compute_distill_losses(self) -> dict[str, Tensor]:
        """The losses, and on demand the statistics of weighted ones, which are logged but not summed."""
        results, statistics, self.calls = {}, {}, {}
        for position, (name, records) in enumerate(self.loss_forward_mappings.items(), 1):
            loss = self.distill_losses[name]
            results[name] = loss(**{argument: self.get_record(**record) for argument, record in records.items()})
            if isinstance(loss, WeightedLoss):
                self.calls[name] = loss.last_call  # type: ignore[assignment]  # now: it may serve the next one as well
            for statistic, value in (self._statistics(name) if self.logs_statistics else {}).items():
                statistics[f'{statistic}_{position}' if statistic in statistics else statistic] = value
        for recorder in self.student_recorders.recorders.values():
            recorder.data_buffer[:] = tree_map(_without_graph, recorder.data_buffer)
        return {**results, **statistics}

    def _statistics(self, name: str) -> dict[str, Tensor]:
        """Of a loss's last call; under the name of its recorder, unless that is the student's head."""
        recorder = self.loss_forward_mappings[name].get('preds_S', RECORDS['preds_S'])['recorder']
        # mmengine sums up whatever has 'loss' in its name
        prefix = '' if recorder == RECORDS['preds_S']['recorder'] else f'{recorder.replace("loss", "logits")}.'
        found = getattr(self.distill_losses[name], 'statistics', {})  # as a loss of one's own may have
        return {f'{prefix}{statistic}': value for statistic, value in found.items()}

    def _is_wired_by_type(self, name: str) -> bool:
        return self.loss_forward_mappings[name].get('preds_S') == RECORDS['preds_S']

    def _records_for(self, loss: Any) -> dict[str, dict]:
        """Those that the loss names and that are recorded."""
        named = [name for name in inspect.signature(loss.forward).parameters if name in RECORDS]
        recorded = {*self.student_recorders.recorders, *self.teacher_recorders.recorders}
        return {name: RECORDS[name] for name in named if RECORDS[name]['recorder'] in recorded}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'calls': {}}  # type: ignore[misc]  # of a batch, and no part of a copy


def _without_graph(record: Any) -> Any:
    """So that a model can be copied after a step; parameters, which have none, stay themselves."""
    return record.detach() if isinstance(record, Tensor) and not record.is_leaf else record


def _check_head(name: str, loss: WeightedLoss, head: Any) -> None:
    of_sigmoids = isinstance(head, MultiLabelClsHead) or getattr(getattr(head, 'loss_module', None), 'use_sigmoid',
                                                                 False)
    known = of_sigmoids or isinstance(head, ClsHead)
    if not known or of_sigmoids == loss.sample_loss.per_class:
        return
    kind, other = ('sigmoids', 'BernoulliKD') if of_sigmoids else ('a softmax', 'SoftCrossEntropy')
    raise ValueError(f'{name}: {type(loss.sample_loss).__name__} is not defined for the student\'s '
                     f'{type(head).__name__}, a head of {kind}. Take mmwsl.WeightedLoss with '
                     f"loss=dict(type='{other}') in model.distiller.distill_losses")


def _check_mixing(name: str, loss: WeightedLoss, mixing: Any) -> None:
    needy = [part for part in (loss.sample_loss, loss.sample_weighting) if part.needs_classes]
    if mixing is not None and needy:
        raise ValueError(f'{name}: {type(needy[0]).__name__} needs one class for each image, and batch_augments mixes '
                         'images and labels (mixup, cutmix). Leave batch_augments out, or take a loss and a weighting '
                         'that class scores leave defined')


@contextmanager
def _explained(who: str, network: nn.Module) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:  # of a recorder, whose source is not there
        raise ValueError(
            f'a recorder of the {who} finds nothing: {error} The {who} is a {type(network).__name__} of '
            f'{[name for name, _ in network.named_children()]}. Name one of its modules in {who}_recorders of '
            "model.distiller; a teacher without a head takes logits=dict(type='ModuleOutputs', source='')") from error
