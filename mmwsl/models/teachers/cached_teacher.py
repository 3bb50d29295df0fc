from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmrazor.models.distillers import ConfigurableDistiller
from torch import Tensor, nn

from mmwsl.cache import CacheError, TeacherCache
from mmwsl.cache.fingerprint import mixing_error, teacher_fingerprint
from mmwsl.functional import hard_loss
from mmwsl.registry import MODELS
from mmwsl.utils.data import to_device

# Beside the logits, where they are not exact.
HARD_LOSS_RECORDER = {'teacher_hard_loss': dict(type='mmrazor.ModuleOutputs', source='hard_loss')}


@MODELS.register_module()
class CachedTeacher(BaseModel):
    """Answers with what a teacher said of the very views once, and has no network.

    Its ``head`` puts out logits, where recorders look for them. What a top K or float16 cannot give back exactly, the
    loss at temperature 1 on which WSL's weight rests, ``hard_loss`` puts out as it was recorded.

    Args:
        cache: Folder of the cache.

    Raises:
        CacheError: If the cache is missing, unfinished or damaged.
    """

    def __init__(self, cache: str) -> None:
        super().__init__()
        self.cache = TeacherCache(cache)
        self.cache.manifest.warn_of_other_versions()
        self.head, self.hard_loss = nn.Identity(), nn.Identity()
        self._losses: list[tuple[str, nn.Module]] = []
        self._restored: tuple[list | None, Tensor, Tensor | None] | None = None

    def restore(self, inputs: Tensor, data_samples: list | None = None) -> None:
        """Restore the next call's answers, because torch.compile cannot trace how. A call does it itself if need be.

        Args, Raises: As :meth:`forward`.
        """
        records = self._stacked(data_samples or [])
        form = self.cache.manifest.answer_format
        logits = to_device(form.decode(records, self._tau()), inputs.device)
        hard_loss = None if form.is_exact else self._hard_loss(records, logits, data_samples or [])
        self._restored = data_samples, logits, hard_loss

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor') -> Tensor:
        """Logits from the records in data_samples, restored for the losses' tau. Shape: (N, C).

        Raises:
            CacheError: If a sample has no record of this cache.
            ValueError: If a top K is asked for another tau, or targets are soft.
        """
        if self._restored is None or self._restored[0] is not data_samples:
            self.restore(inputs, data_samples)
        (_, logits, hard_loss), self._restored = self._restored, None  # type: ignore[misc]
        if hard_loss is not None:
            self.hard_loss(hard_loss)
        return self.head(logits)

    def recorded_by(self, distiller: Mapping) -> dict:
        """A distiller's config with the recorder that these records need.

        Raises:
            ValueError: If it takes from the teacher what is not recorded.
        """
        recorders = distiller.get('teacher_recorders') or {}
        for name, recorder in recorders.items():
            if not str(recorder['type']).endswith('ModuleOutputs') or recorder['source'] not in ('', 'head'):
                raise ValueError(
                    f"a cached teacher has logits and no layers: the teacher's recorder {name!r} asks for "
                    f'{recorder["type"]} of {recorder["source"]!r}. Teach live (without teacher_cache)'
                )
        if distiller.get('distill_deliveries'):
            raise ValueError(
                'a cached teacher has nothing to deliver, got distill_deliveries='
                f'{list(distiller["distill_deliveries"])}. Teach live (without teacher_cache)'
            )
        if self.cache.manifest.answer_format.is_exact:
            return dict(distiller)
        return {**distiller, 'teacher_recorders': {**recorders, **HARD_LOSS_RECORDER}}

    def check(
        self, teacher: Any, teacher_ckpt: str | None, teacher_norm_eval: bool, data_preprocessor: nn.Module
    ) -> None:
        """Raise CacheError or ValueError unless the cache is of this teacher, and inputs are not mixed."""
        if not isinstance(teacher, Mapping):
            raise ValueError(f'with teacher_cache, teacher should be the config that was cached, got {type(teacher)}')
        mixing: Any = getattr(data_preprocessor, 'batch_augments', None)
        if mixing is not None:
            raise mixing_error(' and '.join(type(augment).__name__ for augment in mixing.augments))
        self.cache.check('teacher', teacher_fingerprint(teacher, teacher_ckpt, teacher_norm_eval, data_preprocessor))

    def serve(self, distiller: ConfigurableDistiller) -> None:
        """Restore logits for a distiller's losses.

        Raises:
            ValueError: If the records cannot serve one of them.
        """
        wired = distiller.loss_forward_mappings
        self._losses = [
            (name, distiller.distill_losses[name])
            for name, records in wired.items()
            if any(not record['from_student'] for record in records.values())
        ]
        self._tau()
        if self.cache.manifest.answer_format.is_exact:
            return
        for name, loss in self._losses:
            named = inspect.signature(loss.forward).parameters
            if 'teacher_hard_loss' in named and 'teacher_hard_loss' not in wired[name]:
                raise ValueError(
                    f"these records are not exact, so {name} needs the teacher's loss as well: add "
                    "teacher_hard_loss=dict(recorder='teacher_hard_loss', from_student=False) to its "
                    'loss_forward_mappings'
                )

    @property
    def top1(self) -> float:
        """Top-1 accuracy of the recorded answers, in [0, 1]."""
        return float(self.cache.manifest.top1 or 0)

    def _stacked(self, data_samples: list) -> np.ndarray:
        records = [sample.get('teacher_answer') for sample in data_samples]
        if not records or None in records:
            raise CacheError(
                'the samples carry no records of a teacher: with teacher_cache, train_dataloader.dataset '
                'should be a mmwsl.CachedViews with the same cache, and its sampler a mmwsl.ViewSampler'
            )
        if {record.cache for record in records} != {self.cache.identity}:
            raise CacheError(
                f"the samples' records are of another cache than model.teacher_cache={self.cache.folder}: "
                'train_dataloader.dataset.cache should be the same folder'
            )
        return np.frombuffer(b''.join(record.data for record in records), self.cache.manifest.answer_format.layout)

    def _tau(self) -> float | None:
        """Of the losses; a top K is restored for one."""
        form = self.cache.manifest.answer_format
        if form.top_k is None or not self._losses:
            return None
        taus = {name: getattr(loss, 'tau', None) for name, loss in self._losses}
        if len(set(taus.values())) > 1:
            raise ValueError(
                f'a top {form.top_k} is completed for one temperature, and the losses have {taus}: '
                'cache all classes (without --top-k)'
            )
        return form.checked_tau(next(iter(taus.values())))

    def _hard_loss(self, records: np.ndarray, logits: Tensor, data_samples: list) -> Tensor:
        form = self.cache.manifest.answer_format
        if 'gt_score' not in data_samples[0]:
            return to_device(form.hard_loss(records), logits.device)
        if form.top_k is not None:
            raise ValueError(
                f"targets are scores of classes (gt_score), and a top {form.top_k} knows the teacher's "
                'loss for the true class alone: cache all classes (without --top-k)'
            )
        return hard_loss(logits, torch.stack([sample.gt_score for sample in data_samples]).to(logits))
