"""Find networks of this project, mmpretrain and timm by name, as configs for any number of classes."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mmpretrain
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.apis.model import ModelHub
from mmpretrain.structures import DataSample
from torch import nn

import mmwsl.models  # noqa: F401  registers the parts
from mmwsl.compat import from_extra
from mmwsl.utils.checkpoint import read_weights
from mmwsl.utils.text import first_of

_OF_MMPRETRAIN = Path(mmpretrain.__file__).parent / '.mim/configs/_base_/models'
_TIMM = 'timm:'


def named_network(name: str, classes: int, pixels: int, bases: Path) -> dict[str, Any]:
    """Return the config of a network by its name.

    Args:
        name: A file in ``bases`` (``resnet56``; for 32 pixels the one that ends in ``_cifar``), a model or base config
            of mmpretrain (``resnet34_8xb32_in1k``, ``vit-base-p16``), or a model of timm, searched in this order.
            ``timm:resnet18`` is always timm's.
        classes: Number of classes.
        pixels: Edge of the images, 32 or 224.
        bases: ``configs/_base_/models``.

    Raises:
        ValueError: If there is no network of this name; the closest names are given.
    """
    found = None if name.startswith(_TIMM) else _of_a_file(name, pixels, bases) or _of_the_hub(name)
    if found is None:
        found = _of_timm(name.removeprefix(_TIMM))
    if found is None:
        close = difflib.get_close_matches(name, dict.fromkeys(_known(pixels, bases)), n=3, cutoff=0.6)
        meant = f'. Did you mean {" or ".join(close)}?' if close else '.'
        other = 224 if pixels == 32 else 32
        if _of_a_file(name, other, bases):
            meant = f'; it is one for {other} pixels, to which --pixels {other} brings the images.'
        raise ValueError(
            f'there is no network {name!r} for {pixels} pixels in mmwsl, mmpretrain or timm{meant} '
            'configs/_base_/models, mmpretrain.list_models() and timm.list_models() have all names'
        )
    return _for_classes(found, classes)


def _of_a_file(name: str, pixels: int, bases: Path) -> dict | None:
    suffix = '_cifar' if pixels == 32 else ''
    for path in (
        bases / f'{name}{suffix}.py',
        *sorted(_OF_MMPRETRAIN.rglob(f'{name}{suffix}.py')),
        *sorted(_OF_MMPRETRAIN.rglob(f'{name}.py')),
    ):
        if path.is_file():
            networks = [value for value in Config.fromfile(path).to_dict().values() if isinstance(value, dict)]
            return networks[0]
    return None


def _of_the_hub(name: str) -> dict | None:
    if name not in mmpretrain.list_models(task='Image Classification'):
        return None
    return ModelHub.get(name).config.model.to_dict()


def published_weights(name: str) -> str | None:
    """Return the address of ImageNet weights for ``--teacher-start``, by mmpretrain's name or base config, or None."""
    names = mmpretrain.list_models(f'{name}*', task='Image Classification')
    known = {each: ModelHub.get(each).weights for each in names if each == name or each.startswith(f'{name}_')}
    return next((weights for each, weights in sorted(known.items()) if weights and each.endswith('in1k')), None)


def _of_timm(name: str) -> dict | None:
    try:
        with from_extra('timm'):
            import timm
    except ImportError:
        return None
    return dict(type='TimmClassifier', model_name=name, num_classes=0) if timm.is_model(name) else None


def _known(pixels: int, bases: Path) -> Iterator[str]:
    suffix = '_cifar' if pixels == 32 else ''
    stems = {path.stem for path in bases.glob('*.py')}
    yield from (stem.removesuffix(suffix) for stem in stems if stem.endswith('_cifar') == (pixels == 32))
    yield from mmpretrain.list_models(task='Image Classification')
    try:
        with from_extra('timm'):
            import timm
    except ImportError:
        return
    yield from timm.list_models()


def _for_classes(network: dict, classes: int) -> dict:
    """Set the number of classes, and leave out parts of a training recipe: mixed images, and figures to log."""
    network = {key: value for key, value in network.items() if key not in ('train_cfg', 'data_preprocessor')}
    if 'head' not in network:
        return {**network, 'num_classes': classes}
    head = {key: value for key, value in network['head'].items() if key not in ('topk', 'cal_acc')}
    if head.get('loss') == dict(type='CrossEntropyLoss', loss_weight=1.0):
        del head['loss']  # the default
    return {**network, 'head': {**head, 'num_classes': classes}}


class Trial(NamedTuple):
    """Results of a network's trial step."""

    training: float
    """Seconds per image, forward and backward."""
    forward: float
    """Seconds per image, forward alone."""
    has_batchnorm: bool
    network: Any


def try_network(name: str, network: dict, pixels: int, classes: int, batch: int = 16) -> Trial:
    """Build a network and try steps on random images, on the GPU if there is one.

    Raises:
        ValueError: If it cannot be built, cannot read images of this size, or does not predict this many classes.
    """
    init_default_scope('mmpretrain')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        model = MODELS.build({'_scope_': 'mmpretrain', **network}).to(device).train()
        images = torch.randn(batch, 3, pixels, pixels, device=device)
        samples = [DataSample().set_gt_label(0).to(device) for _ in range(batch)]
        training = _seconds(
            lambda: sum(value for key, value in model(images, samples, mode='loss').items() if 'loss' in key).backward()
        )
        with torch.no_grad():
            model.eval()
            forward = _seconds(lambda: model(images, mode='tensor'))
            logits = model(images, mode='tensor')
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f'{name} cannot be trained on {pixels} x {pixels} pixels: {reason[-1] if reason else error!r}'
            f'. Choose another network, or try --pixels {224 if pixels == 32 else 32}'
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (batch, classes):
        raise ValueError(
            f'{name} should output logits of the shape ({batch}, {classes}), got '
            f'{getattr(logits, "shape", type(logits).__name__)}. Choose another network'
        )
    batchnorm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return Trial(training / batch, forward / batch, batchnorm, model)


def _seconds(work: Callable[[], object]) -> float:
    """Return the shorter time of two steps; on a CPU the time per step if every core ran steps of its own."""
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        return min(_timed(work, time.perf_counter) for _ in range(2))
    try:
        torch.set_num_threads(1)  # processor time, which other programs do not lengthen
        return min(_timed(work, time.process_time) for _ in range(2)) / (os.cpu_count() or 1)
    finally:
        torch.set_num_threads(threads)


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin


def pretrained_start(network: dict, built: Any, path: str) -> dict:
    """Return the settings with which a network's config starts from weights trained on other classes.

    Args:
        network: The network's config.
        built: The network, built from it.
        path: File or URL of a checkpoint.

    Raises:
        ValueError: If the file lacks weights of this network, other than its classifier's; the first are named.
    """
    weights = read_weights(path)
    timm = 'model_name' in network
    body = built.model if timm else built.backbone
    prefix = next(
        (prefix for prefix in ('backbone.', 'model.', 'module.', '') if any(key.startswith(prefix) for key in weights)),
        '',
    )
    given = {key.removeprefix(prefix): value.shape for key, value in weights.items() if key.startswith(prefix)}
    classifier = {f'{part}.{end}' for part in _classifiers(body) for end in ('weight', 'bias')}
    missing = [
        key
        for key, value in body.state_dict().items()
        if given.get(key) != value.shape and key not in classifier and not key.endswith('num_batches_tracked')
    ]
    if missing:
        raise ValueError(
            f'{path} lacks {len(missing)} of {len(body.state_dict())} weights of this network, or has '
            f'them in other shapes: {first_of(missing)}. Name a file of the same network'
        )
    start = dict(type='Pretrained', checkpoint=path, **(dict(prefix=prefix) if prefix else {}))
    # timm's own pretrained=True would not last: mmengine initialises the network again before training
    return dict(init_cfg=start) if timm else dict(backbone={**network['backbone'], 'init_cfg': start})


def _classifiers(body: Any) -> tuple[str, ...]:
    """Return the names of the layers that output a timm network's logits; an mmpretrain backbone has none."""
    named = (getattr(body, 'pretrained_cfg', None) or {}).get('classifier') or ()
    return (named,) if isinstance(named, str) else tuple(named)
