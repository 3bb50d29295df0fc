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

# Added to the logits' recorder if stored logits are not exact.
HARD_LOSS_RECORDER = {'teacher_hard_loss': dict(type='mmrazor.ModuleOutputs', source='hard_loss')}


@MODELS.register_module()
class CachedTeacher(BaseModel):
    """Replays a teacher's cached logits for the current views; builds no network.

    Its ``head`` outputs the logits, where recorders look for them. WSL's weight needs the loss at temperature 1, which
    a top K or float16 logits cannot reproduce exactly; the module ``hard_loss`` outputs the stored loss in that case.

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
        """Restore the logits of the next call in advance, because torch.compile cannot trace it.

        Without it, the call restores them itself.

        Args, Raises: As :meth:`forward`.
        """
        answers = self._stacked(data_samples or [])
        form = self.cache.manifest.answer_format
        logits = to_device(form.decode(answers, self._tau()), inputs.device)
        hard_loss = None if form.is_exact else self._hard_loss(answers, logits, data_samples or [])
        self._restored = data_samples, logits, hard_loss

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor') -> Tensor:
        """Return the logits cached in data_samples, restored at the losses' tau. Shape: (N, C).

        Args:
            inputs: Images; only their device matters.
            data_samples: Samples with the field ``teacher_answer``. Length: N.
            mode: Ignored.

        Raises:
            CacheError: If a sample has no answer from this cache.
            ValueError: If a top K was not stored for this tau, or targets are soft.
        """
        if self._restored is None or self._restored[0] is not data_samples:
            self.restore(inputs, data_samples)
        (_, logits, hard_loss), self._restored = self._restored, None  # type: ignore[misc]
        if hard_loss is not None:
            self.hard_loss(hard_loss)
        return self.head(logits)

    def with_recorders(self, distiller: Mapping) -> dict:
        """Return a distiller's config with the recorders that this cache needs.

        Raises:
            ValueError: If the distiller reads more of the teacher than its logits.
        """
        recorders = distiller.get('teacher_recorders') or {}
        for name, recorder in recorders.items():
            if not str(recorder['type']).endswith('ModuleOutputs') or recorder['source'] not in ('', 'head'):
                raise ValueError(
                    f"a cached teacher has logits but no layers, and the teacher's recorder {name!r} reads "
                    f'{recorder["type"]} of {recorder["source"]!r}. Run the teacher live (without teacher_cache)'
                )
        if distiller.get('distill_deliveries'):
            raise ValueError(
                'a cached teacher has nothing to deliver, got distill_deliveries='
                f'{list(distiller["distill_deliveries"])}. Run the teacher live (without teacher_cache)'
            )
        if self.cache.manifest.answer_format.is_exact:
            return dict(distiller)
        return {**distiller, 'teacher_recorders': {**recorders, **HARD_LOSS_RECORDER}}

    def check(
        self, teacher: Any, teacher_ckpt: str | None, teacher_norm_eval: bool, data_preprocessor: nn.Module
    ) -> None:
        """Raise CacheError or ValueError unless the cache belongs to this teacher and inputs are not mixed."""
        if not isinstance(teacher, Mapping):
            raise ValueError(f'with teacher_cache, teacher should be the config that was cached, got {type(teacher)}')
        mixing: Any = getattr(data_preprocessor, 'batch_augments', None)
        if mixing is not None:
            raise mixing_error(' and '.join(type(augment).__name__ for augment in mixing.augments))
        self.cache.check('teacher', teacher_fingerprint(teacher, teacher_ckpt, teacher_norm_eval, data_preprocessor))

    def prepare_for_losses(self, distiller: ConfigurableDistiller) -> None:
        """Set the losses whose temperature decides how logits are restored.

        Raises:
            ValueError: If the cache does not hold what one of them needs.
        """
        wired = distiller.loss_forward_mappings
        self._losses = [
            (name, distiller.distill_losses[name])
            for name, mappings in wired.items()
            if any(not mapping['from_student'] for mapping in mappings.values())
        ]
        self._tau()
        if self.cache.manifest.answer_format.is_exact:
            return
        for name, loss in self._losses:
            named = inspect.signature(loss.forward).parameters
            if 'teacher_hard_loss' in named and 'teacher_hard_loss' not in wired[name]:
                raise ValueError(
                    f"the cache's logits are not exact, so {name} needs the teacher's loss as well: add "
                    "teacher_hard_loss=dict(recorder='teacher_hard_loss', from_student=False) to its "
                    'loss_forward_mappings'
                )

    @property
    def top1(self) -> float:
        """Top-1 accuracy of the cached answers, in [0, 1]."""
        return float(self.cache.manifest.top1 or 0)

    def _stacked(self, data_samples: list) -> np.ndarray:
        answers = [sample.get('teacher_answer') for sample in data_samples]
        if not answers or None in answers:
            raise CacheError(
                'the samples have no cached answers of a teacher: with teacher_cache, train_dataloader.dataset '
                'should be a mmwsl.CachedViews with the same cache, and its sampler a mmwsl.ViewSampler'
            )
        if {answer.cache for answer in answers} != {self.cache.identity}:
            raise CacheError(
                f"the samples' answers come from another cache than model.teacher_cache={self.cache.folder}: "
                'set train_dataloader.dataset.cache to the same folder'
            )
        return np.frombuffer(b''.join(answer.data for answer in answers), self.cache.manifest.answer_format.layout)

    def _tau(self) -> float | None:
        """Temperature of the losses, at which a top K is restored; None if all classes are stored."""
        form = self.cache.manifest.answer_format
        if form.top_k is None or not self._losses:
            return None
        taus = {name: getattr(loss, 'tau', None) for name, loss in self._losses}
        if len(set(taus.values())) > 1:
            raise ValueError(
                f'a top {form.top_k} can only be restored at one temperature, and the losses have {taus}: '
                'cache all classes (without --top-k)'
            )
        return form.checked_tau(next(iter(taus.values())))

    def _hard_loss(self, answers: np.ndarray, logits: Tensor, data_samples: list) -> Tensor:
        form = self.cache.manifest.answer_format
        if 'gt_score' not in data_samples[0]:
            return to_device(form.hard_loss(answers), logits.device)
        if form.top_k is not None:
            raise ValueError(
                f"targets are class scores (gt_score), and a top {form.top_k} has the teacher's "
                'loss for the true class alone: cache all classes (without --top-k)'
            )
        return hard_loss(logits, torch.stack([sample.gt_score for sample in data_samples]).to(logits))
