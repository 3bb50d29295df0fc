from __future__ import annotations

import numpy as np
from mmcv.transforms import BaseTransform

from mmwsl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LabelNoise(BaseTransform):
    """Give some images a wrong label, drawn uniformly from the other classes (symmetric label noise).

    Which images get which label depends only on the seed and the image's place in the dataset (``sample_idx``, counted
    after ``indices`` and, in mmwsl's wrappers, through all parts of a ConcatDataset), so it is the same in every epoch
    and run.

    Args:
        prob: Probability that an image's label is wrong.
        num_classes: Number of classes of the dataset.
        seed: Seed of the noise.

    Raises:
        ValueError: If prob is not in [0, 1], or there are fewer than two classes. On use, if an image has no single
            label below num_classes, or no ``sample_idx``.

    Examples:
        >>> LabelNoise(prob=1.0, num_classes=2)(dict(gt_label=0, sample_idx=7))['gt_label']
        1
    """

    changes_labels = True  # read by mmwsl.cache.fingerprint.training_set

    def __init__(self, prob: float, num_classes: int, seed: int = 0) -> None:
        if not 0 <= prob <= 1 or num_classes < 2:
            raise ValueError(
                f'prob should be a probability and num_classes 2 or more, got prob={prob} and num_classes={num_classes}'
            )
        self.prob, self.num_classes, self.seed = prob, num_classes, seed

    def transform(self, results: dict) -> dict:
        """Change ``gt_label`` with probability ``prob``, as decided by ``sample_idx``."""
        label = np.asarray(results.get('gt_label', ()))
        if label.size != 1 or not 0 <= label.item() < self.num_classes:
            raise ValueError(
                f'LabelNoise needs one label in [0, {self.num_classes}) for each image, got '
                f'gt_label={results.get("gt_label")}: set num_classes to that of the dataset'
            )
        if 'sample_idx' not in results:
            raise ValueError(
                "LabelNoise needs sample_idx, an image's place in the dataset, which mmengine's datasets "
                f'provide, got only {sorted(results)}'
            )
        chance = np.random.default_rng([self.seed, results['sample_idx']])
        if chance.random() < self.prob:
            results['gt_label'] = int((label.item() + chance.integers(1, self.num_classes)) % self.num_classes)
        return results

    def __repr__(self) -> str:
        return f'LabelNoise(prob={self.prob}, num_classes={self.num_classes}, seed={self.seed})'
