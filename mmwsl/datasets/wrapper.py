from __future__ import annotations

from typing import Any

from mmwsl.registry import DATASETS


class DatasetWrapper:
    """What a dataset around another one has in common: whatever it does not do itself, the inner one does.

    Args:
        dataset: Config of the dataset, or the dataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset

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
