from __future__ import annotations

from typing import Any

import numpy as np

from mmwsl.datasets.wrapper import Selection
from mmwsl.registry import DATASETS
from mmwsl.utils.old_names import keep_registered


@DATASETS.register_module()
class BootstrapDataset(Selection):
    """A bootstrap resample of a dataset: as many items, drawn with replacement, so about 63 % of its images occur.

    The items keep their index in the dataset itself (``sample_idx``). Wrap it in ``SeededViews`` or ``DeviceDataset``,
    so that an image that was drawn twice is seen in two views.

    Args:
        dataset: Config of the dataset, or the dataset.
        seed: Seed of the draw. The same seed and length draw the same indices.

    Raises:
        ValueError: If the dataset yields views.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(dataset)
        size = len(self.dataset)
        self.indices = np.random.default_rng(seed).integers(size, size=size)


keep_registered(DATASETS, 'Resample', BootstrapDataset)
