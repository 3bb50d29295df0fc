from __future__ import annotations

from typing import Any

import numpy as np

from mmwsl.registry import DATASETS
from mmwsl.utils.data import number_images


class DatasetWrapper:
    """What a dataset around another one has in common: whatever it does not do itself, the inner one does.

    Args:
        dataset: Config of the dataset, or the dataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        number_images(self.dataset)

    @property
    def pipeline(self) -> Any:
        """The dataset's; mmpretrain's browse_dataset puts its own in place."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        self.dataset.pipeline = pipeline

    def __getattr__(self, name: str) -> Any:  # metainfo, full_init, ...
        # 'dataset' is not there yet while a copy is being made; the inner __getitems__ and the like know no wrapper
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class Selection(DatasetWrapper):
    """Some items of a dataset, which keep the index that they have there (``sample_idx``).

    A subclass fills ``indices``: the place in the dataset of each item. Shape: (N, ).

    Args:
        dataset: Config of the dataset, or the dataset.

    Raises:
        ValueError: If the dataset hands out views.
    """

    indices: np.ndarray

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        if getattr(self.dataset, 'takes_views', False):
            raise ValueError(
                f'mmwsl.{type(self).__name__} picks images and not views, got a '
                f'{type(self.dataset).__name__}: put it inside of mmwsl.SeededViews or '
                'mmwsl.DeviceDataset. The views of a teacher cache cannot be picked from: teach live '
                '(without teacher_cache)'
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def get_data_info(self, index: int) -> dict:
        """Of the item's image, as mmengine's datasets give it."""
        return self.dataset.get_data_info(int(self.indices[index]))
