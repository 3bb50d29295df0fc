from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmrazor.models.distillers import ConfigurableDistiller
from torch import Tensor, nn

from mmwsl.registry import MODELS

STUDENT_RECORDERS = {'hard_loss': dict(type='ModuleInputs', source='head.loss_module')}
TEACHER_RECORDERS = {'logits': dict(type='ModuleOutputs', source='head')}
# Where a logit loss finds each of its arguments, under the names that MMRazor gives them.
RECORDS = {
    'preds_S': dict(recorder='hard_loss', from_student=True, data_idx=0),
    'preds_T': dict(recorder='logits', from_student=False),
    'gt_labels': dict(recorder='hard_loss', from_student=True, data_idx=1),
    'teacher_hard_loss': dict(recorder='teacher_hard_loss', from_student=False),  # of a teacher cache that is not exact
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
    """

    def __init__(self, distill_losses: dict | None = None, student_recorders: dict | None = None,
                 teacher_recorders: dict | None = None, loss_forward_mappings: dict | None = None,
                 **kwargs: Any) -> None:
        # as in MMRazor's own configs, a type without a scope is MMRazor's, whatever default_scope the run has
        with DefaultScope.overwrite_default_scope('mmrazor'):
            super().__init__(
                distill_losses=distill_losses or {'loss_wsl': dict(type='mmwsl.WSLLoss')},
                student_recorders={**STUDENT_RECORDERS, **(student_recorders or {})},
                teacher_recorders={**TEACHER_RECORDERS, **(teacher_recorders or {})},
                **kwargs)
        mappings = {name: self._records_for(loss) for name, loss in self.distill_losses.items()}
        mappings.update(loss_forward_mappings or {})
        self._check_loss_forward_mappings(self.distill_losses, mappings, self.student_recorders,
                                          self.teacher_recorders)
        self.loss_forward_mappings = mappings

    def prepare_from_student(self, model: BaseModel) -> None:
        """Find what is recorded in the student, or raise ValueError."""
        with _explained('student', model):
            super().prepare_from_student(model)

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Find what is recorded in the teacher, or raise ValueError."""
        with _explained('teacher', model):
            super().prepare_from_teacher(model)

    def compute_distill_losses(self) -> dict[str, Tensor]:
        """The losses, and what a loss says of its last batch in ``statistics``, which is logged but not summed."""
        results = super().compute_distill_losses()
        for position, loss in enumerate(self.distill_losses.values(), 1):
            for name, value in getattr(loss, 'statistics', {}).items():
                results[f'{name}_{position}' if name in results else name] = value
        return results

    def _records_for(self, loss: Any) -> dict[str, dict]:
        """Those that the loss names and that are recorded."""
        named = [name for name in inspect.signature(loss.forward).parameters if name in RECORDS]
        recorded = {*self.student_recorders.recorders, *self.teacher_recorders.recorders}
        return {name: RECORDS[name] for name in named if RECORDS[name]['recorder'] in recorded}


@contextmanager
def _explained(who: str, network: nn.Module) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:  # of a recorder, whose source is not there
        raise ValueError(
            f'a recorder of the {who} finds nothing: {error} The {who} is a {type(network).__name__} of '
            f'{[name for name, _ in network.named_children()]}. Name one of its modules in {who}_recorders of '
            "model.distiller; a teacher without a head takes logits=dict(type='ModuleOutputs', source='')") from error
