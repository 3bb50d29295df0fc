from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mmcv
import numpy as np
from mmengine.dataset import BaseDataset

from mmwsl.datasets.digits import Digits
from mmwsl.registry import DATASETS

INK, EDGE = 0.5, 0.15
"""Brightness above which a pixel belongs to a digit, and above which it is no longer background."""
IGNORED = 255


@DATASETS.register_module()
class DigitScenes(BaseDataset):
    """Noisy grey canvases with a few :class:`Digits` on each, for segmentation, detection and multi-label tasks.

    Scenes are composed from the digits of one split, so training and test share no digit, and they are the same in
    every run. Digits do not overlap; fragments of digits, which belong to no class, clutter the background.

    Args:
        split: 'train' or 'test'.
        task: Kind of annotation.

            - 'seg': ``gt_seg_map``, with classes 0 (background) to 10 (the digit 9), and 255 on soft edges;
            - 'det': ``instances``, each with a box (x1, y1, x2, y2) in pixels around the ink, and a class 0 to 9;
            - 'multi': ``gt_label``, the list of the digits on the canvas.
        scenes: Number of scenes.
        size: Side of a canvas in pixels.
        digits: Lowest and highest number of digits on a canvas; there are fewer if no room is left.
        kwargs: As for mmengine's ``BaseDataset``: ``pipeline``, ``indices``, ``test_mode`` and so on.

    Raises:
        ValueError: For another split or task, or digits that do not fit the canvas.
        ImportError: If scikit-learn is missing; the message names the extra to install.
    """

    SIDES = (20, 32)
    """Lowest and highest side of a digit in pixels."""

    def __init__(
        self,
        split: str = 'train',
        task: str = 'seg',
        scenes: int = 600,
        size: int = 64,
        digits: tuple[int, int] = (1, 4),
        **kwargs: Any,
    ) -> None:
        if task not in _ANNOTATIONS:
            raise ValueError(f'task should be one of {tuple(_ANNOTATIONS)}, got {task!r}')
        if size < self.SIDES[1] or not 1 <= digits[0] <= digits[1]:
            raise ValueError(
                f'size should be at least {self.SIDES[1]} pixels, the side of a digit, and digits at least 1 and in '
                f'order, got size={size}, digits={tuple(digits)}'
            )
        self.task, self.scenes, self.size, self.digits = task, scenes, size, digits
        self.source = Digits(split)
        classes = self.source.METAINFO['classes']
        colours = np.array([[[36 * i, 0.8, 1]] for i in range(10)], np.float32)  # hue, saturation, value
        palette = [[0, 0, 0], *(mmcv.hsv2bgr(colours)[:, 0] * 255)]
        metainfo = dict(
            classes=('background', *classes) if task == 'seg' else classes,
            palette=[list(map(int, colour)) for colour in palette[0 if task == 'seg' else 1 :]],
        )
        super().__init__(ann_file='', metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return the images as uint8 arrays of shape (size, size, 3), with their annotations."""
        annotate, samples = _ANNOTATIONS[self.task], [self.source[i] for i in range(len(self.source))]
        ink = [sample['img'][..., 0].astype(np.float32) / 16 for sample in samples]
        labels = [sample['gt_label'] for sample in samples]
        found = []
        for scene in range(self.scenes):
            canvas, placed = _draw(np.random.default_rng((0, scene)), ink, labels, self.size, self.digits, self.SIDES)
            found.append(
                dict(
                    img=canvas,
                    img_id=scene,
                    img_path=f'scene {scene}',
                    height=self.size,
                    width=self.size,
                    img_shape=canvas.shape[:2],
                    ori_shape=canvas.shape[:2],
                    **annotate(placed, self.size),
                )
            )
        return found


Placed = list[tuple[int, int, int, np.ndarray]]
"""Class, top, left and brightness, in [0, 1], of each digit."""


def _draw(
    rng: np.random.Generator,
    ink: list[np.ndarray],
    labels: list[int],
    size: int,
    digits: tuple[int, int],
    sides: tuple[int, int],
) -> tuple[np.ndarray, Placed]:
    """Draw a canvas, and return it with the digits on it."""
    free, placed = np.ones((size, size), bool), []
    for _ in range(rng.integers(digits[0], digits[1] + 1)):
        chosen, side = rng.integers(len(ink)), rng.integers(sides[0], sides[1] + 1)
        for _ in range(20):
            top, left = rng.integers(0, size - side + 1, 2)
            room = free[top : top + side, left : left + side]
            if room.all():
                room[:] = False
                grown = mmcv.imresize(ink[chosen], (side, side), interpolation='bilinear')
                placed.append((labels[chosen], int(top), int(left), grown))
                break
    light = _clutter(rng, ink, size)
    for _, top, left, grown in placed:
        part = light[top : top + len(grown), left : left + len(grown)]
        part[:] = part * (1 - grown) + rng.uniform(0.7, 1.0) * grown
    light += rng.normal(0, 0.05, light.shape)
    return np.repeat((light.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, 2), placed


def _clutter(rng: np.random.Generator, ink: list[np.ndarray], size: int) -> np.ndarray:
    """Draw a background with a gradient of brightness, and fragments of digits too small to be read."""
    slope = np.linspace(0, 1, size, dtype=np.float32)
    light = 0.1 + 0.2 * rng.uniform() * slope[:, None] + 0.2 * rng.uniform() * slope
    for _ in range(8):
        y, x = rng.integers(0, 5, 2)
        fragment = mmcv.imresize(ink[rng.integers(len(ink))][y : y + 4, x : x + 4], (8, 8))
        top, left = rng.integers(0, size - 8 + 1, 2)
        part = light[top : top + 8, left : left + 8]
        np.maximum(part, 0.5 * fragment, out=part)
    return light


def _segmentation(placed: Placed, size: int) -> dict[str, Any]:
    classes = np.zeros((size, size), np.uint8)
    for label, top, left, grown in placed:
        part = classes[top : top + len(grown), left : left + len(grown)]
        part[grown > EDGE] = IGNORED
        part[grown > INK] = label + 1
    return dict(gt_seg_map=classes, seg_fields=['gt_seg_map'], reduce_zero_label=False)


def _detection(placed: Placed, size: int) -> dict[str, Any]:
    instances = []
    for label, top, left, grown in placed:
        rows, columns = np.nonzero((grown > INK).any(1))[0], np.nonzero((grown > INK).any(0))[0]
        box = [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
        instances.append(dict(bbox=[float(edge) for edge in box], bbox_label=label, ignore_flag=0))
    return dict(instances=instances, scale_factor=(1.0, 1.0))  # mmdet's heads divide boxes by scale_factor


def _labels(placed: Placed, size: int) -> dict[str, Any]:
    return dict(gt_label=sorted({label for label, *_ in placed}))


_ANNOTATIONS: dict[str, Callable[[Placed, int], dict[str, Any]]] = {
    'seg': _segmentation,
    'det': _detection,
    'multi': _labels,
}
