from __future__ import annotations

from typing import Any

import numpy as np

from mmwsl.registry import DATASETS
from mmwsl.utils.data import number_images


class DatasetWrapper:
    """Base class of datasets that wrap another one; attributes that it does not define are the inner dataset's.

    Args:
        dataset: Config of the dataset, or the dataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        number_images(self.dataset)

    @property
    def pipeline(self) -> Any:
        """The inner dataset's pipeline; setting it, as mmpretrain's browse_dataset does, sets the inner dataset's."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        self.dataset.pipeline = pipeline

    def __getattr__(self, name: str) -> Any:  # metainfo, full_init, ...
        # 'dataset' is not set yet while a copy is made; the inner __getitems__ and the like would bypass the wrapper
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class Selection(DatasetWrapper):
    """Base class of datasets that select items of another one; the items keep their index in it (``sample_idx``).

    A subclass sets ``indices``, the place of each item in the dataset. Shape: (N, ).

    Args:
        dataset: Config of the dataset, or the dataset.

    Raises:
        ValueError: If the dataset yields views.
    """

    indices: np.ndarray

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        if getattr(self.dataset, 'takes_views', False):
            raise ValueError(
                f'mmwsl.{type(self).__name__} selects images and not views, got a '
                f'{type(self.dataset).__name__}: put it inside mmwsl.SeededViews or '
                'mmwsl.DeviceDataset. The views of a teacher cache cannot be selected: run the teacher live '
                '(without teacher_cache)'
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def get_data_info(self, index: int) -> dict:
        """Return the information that mmengine's datasets give about the item's image."""
        return self.dataset.get_data_info(int(self.indices[index]))
