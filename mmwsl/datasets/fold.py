from __future__ import annotations

from typing import Any

import numpy as np

from mmwsl.datasets.wrapper import Selection
from mmwsl.registry import DATASETS


@DATASETS.register_module()
class Fold(Selection):
    """A dataset without one of its folds, to train on, or that fold alone.

    A seeded permutation of the items is cut into folds whose sizes differ by at most one, so each item is in exactly
    one. The items keep their order and their index in the dataset itself (``sample_idx``). Wrap it in ``SeededViews``
    or ``DeviceDataset``. Train one network without each fold, and ``tools/teacher_losses.py --folds`` computes
    for every training image the loss of the network that never saw it.

    Args:
        dataset: Config of the dataset, or the dataset.
        fold: The fold that is left out, counted from 0.
        folds: Number of folds.
        held_out: Whether to use the fold itself instead of all others.
        seed: Seed of the permutation. The same seed, length and number of folds give the same folds.

    Raises:
        ValueError: If the dataset yields views, ``folds`` is not in [2, N], or ``fold`` is not in [0, folds).

    Examples:
        >>> digits = dict(type='mmwsl.Digits', split='train', pipeline=[])
        >>> len(Fold(digits, fold=0, folds=5)), len(Fold(digits, fold=0, folds=5, held_out=True))
        (480, 120)
    """

    def __init__(self, dataset: Any, fold: int = 0, folds: int = 5, held_out: bool = False, seed: int = 0) -> None:
        super().__init__(dataset)
        size = len(self.dataset)
        if not 2 <= folds <= size:
            raise ValueError(f'folds should be at least 2 and at most the number of images, {size}, got {folds}')
        if not 0 <= fold < folds:
            raise ValueError(f'fold should be in [0, {folds}), counted from 0, got {fold}')
        self.fold, self.folds, self.held_out, self.seed = fold, folds, held_out, seed
        own = np.sort(np.array_split(np.random.default_rng(seed).permutation(size), folds)[fold])
        self.indices = own if held_out else np.delete(np.arange(size), own)
