from __future__ import annotations

from typing import Any

import numpy as np

from mmwsl.datasets.wrapper import DatasetWrapper
from mmwsl.registry import DATASETS


@DATASETS.register_module()
class Resample(DatasetWrapper):
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
        if getattr(self.dataset, 'takes_views', False):
            raise ValueError(f'mmwsl.Resample draws images and not views, got a {type(self.dataset).__name__}: put it '
                             'inside of mmwsl.SeededViews or mmwsl.DeviceDataset. The views of a teacher cache cannot '
                             'be resampled: teach live (without teacher_cache)')
        size = len(self.dataset)
        self.indices = np.random.default_rng(seed).integers(size, size=size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def get_data_info(self, index: int) -> dict:
        """Of the item's image, as mmengine's datasets give it."""
        return self.dataset.get_data_info(int(self.indices[index]))
