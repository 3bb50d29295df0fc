from __future__ import annotations

from typing import Any

import numpy as np

from mmwsl.datasets.wrapper import Selection
from mmwsl.registry import DATASETS


@DATASETS.register_module()
class Resample(Selection):
    """A bootstrap resample of a dataset: as many items, drawn with replacement; about 63 % of its images occur.

    The items keep the index that they have in the dataset itself (``sample_idx``). Put it inside ``SeededViews`` or
    ``DeviceDataset``, so that an image that was drawn twice is seen in two views.

    Args:
        dataset: Config of the dataset, or the dataset.
        seed: Of the resample. The same seed and length draw the same indices.

    Raises:
        ValueError: If the dataset hands out views.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(dataset)
        size = len(self.dataset)
        self.indices = np.random.default_rng(seed).integers(size, size=size)
