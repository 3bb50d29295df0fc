from __future__ import annotations

from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset

from mmwsl.compat import from_extra
from mmwsl.registry import DATASETS


@DATASETS.register_module()
class Digits(BaseDataset):
    """Handwritten digits from scikit-learn: 1,797 grey images of 8x8 pixels, values 0 to 16, ten classes.

    Source: ``sklearn.datasets.load_digits``, the test set of the UCI ML hand-written digits data. Nothing is
    downloaded. The split is fixed and stratified: 600 images to train on, 1,197 to test on.

    Args:
        split: 'train' or 'test'.
        kwargs: As for mmpretrain's ``BaseDataset``: ``pipeline``, ``indices``, ``test_mode`` and so on.

    Examples:
        >>> digits = Digits('test', pipeline=[])
        >>> len(digits), digits[0]['img'].shape
        (1197, (8, 8, 1))
    """

    METAINFO = {'classes': tuple('0123456789')}
    TRAIN_SIZE = 600

    def __init__(self, split: str = 'train', **kwargs: Any) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"split should be 'train' or 'test', got {split!r}")
        self.split = split
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return the images as uint8 arrays of shape (8, 8, 1), with labels.

        Raises:
            ImportError: If scikit-learn is missing; the message names the extra to install.
        """
        with from_extra('demo'):  # slow to import, and used only here
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        images, labels = load_digits().images, load_digits().target
        train, test = train_test_split(
            np.arange(len(labels)), train_size=self.TRAIN_SIZE, stratify=labels, random_state=0
        )
        chosen = np.sort(train if self.split == 'train' else test)
        return [dict(img=images[i].astype(np.uint8)[..., None], gt_label=int(labels[i])) for i in chosen]
