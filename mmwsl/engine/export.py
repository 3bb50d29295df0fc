"""Export a student: its weights, a config that predicts with them and, if wanted, an ONNX file."""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmpretrain.models.classifiers.base import BaseClassifier
from torch import Tensor, nn

from mmwsl.analysis.predict import network_config
from mmwsl.compat import from_extra
from mmwsl.engine.hooks.check_labels_hook import predicted_classes
from mmwsl.utils.checkpoint import load_weights
from mmwsl.utils.data import dataset_chain
from mmwsl.utils.files import whole_file

_MADE_BY = '# Predicts with the student in the file of the same name; written by convert_kd_ckpt_to_student.py.'
_ONNX_TOLERANCE = 1e-3  # of the largest logit


class ExportError(ValueError):
    """No config can be written that predicts with a student; the message has the reason."""


class _Arrays(NamedTuple):
    """Images of a dataset that reads no image files: size in pixels, whether they are gray, and the largest value."""

    size: int
    is_gray: bool = False
    brightest: int = 255


_ARRAYS = {
    'CIFAR10': _Arrays(32),
    'CIFAR100': _Arrays(32),
    'MNIST': _Arrays(28, is_gray=True),
    'FashionMNIST': _Arrays(28, is_gray=True),
    'Digits': _Arrays(8, is_gray=True, brightest=16),
}


def config_in(meta: Mapping[str, Any]) -> Config | None:
    """Return the config that mmengine keeps in a checkpoint, read as data: nothing in it is run.

    Args:
        meta: ``meta`` of the checkpoint.

    Returns:
        None if there is none, or if it holds more than literals.
    """
    try:
        lines = ast.parse(meta['cfg']).body
        return Config({line.targets[0].id: _literal(line.value) for line in lines})  # type: ignore[attr-defined]
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError):
        return None


def _literal(node: ast.expr) -> Any:
    """Evaluate a literal; ``dict(...)`` counts as one."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict':
            raise ValueError(f'{ast.unparse(node.func)}() is no literal')
        pairs = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
        return {key: value for part in (*map(_literal, node.args), pairs) for key, value in part.items()}
    if isinstance(node, (ast.List, ast.Tuple)):
        return (list if isinstance(node, ast.List) else tuple)(map(_literal, node.elts))
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


def inference_config(cfg: Config) -> Config:
    """Return a config for mmpretrain's ``ImageClassificationInferencer`` that treats image files as the test did.

    Image files are read as BGR. For a student of a dataset of RGB arrays, such as CIFAR, the channels are reversed and
    images are resized to the dataset's size; for a dataset of gray images they are made gray.

    Args:
        cfg: Config of the distillation, or of a network alone.

    Raises:
        ExportError: If the config has no test images, or they are of a dataset that this function does not know.
    """
    network = network_config(cfg)
    if 'TimmClassifier' in str(network.get('type')):
        network.pretrained = False  # download nothing
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    dataset = dataset_chain(loader.get('dataset') or {})[-1]
    pipeline, preprocessor = _from_files(dataset, network.get('data_preprocessor') or ConfigDict())
    network.data_preprocessor = preprocessor
    # mmpretrain uses the class names of the dataset's type if the checkpoint has none: CustomDataset has none
    found = ConfigDict(
        default_scope='mmpretrain',
        model=network,
        test_dataloader=dict(dataset=dict(type='CustomDataset', pipeline=pipeline)),
    )
    modules = list((cfg.get('custom_imports') or {}).get('imports') or ())
    if needs_mmwsl(found):
        modules.insert(0, 'mmwsl.registry')
    if modules:
        found.custom_imports = dict(imports=modules, allow_failed_imports=False)
    return Config(found)


def needs_mmwsl(cfg: Mapping[str, Any]) -> bool:
    """Whether a config names a type that only mmwsl registers or makes importable."""
    return bool(re.search(r"'type': '(mmwsl|mmrazor|mmcls)\.", str(dict(cfg))))


def _from_files(dataset: ConfigDict, preprocessor: ConfigDict) -> tuple[list[Any], ConfigDict]:
    """Return transforms that read a file and continue with the dataset's, and the preprocessor for their output."""
    pipeline, preprocessor = copy.deepcopy(dataset.get('pipeline') or []), copy.deepcopy(preprocessor)
    preprocessor.setdefault('type', 'ClsDataPreprocessor')
    kind = str(dataset.get('type')).rpartition('.')[2]
    if pipeline and str(pipeline[0].get('type')).endswith('LoadImageFromFile'):
        gray = [_gray()] if str(pipeline[0].get('color_type')).startswith('grayscale') else []
        return [pipeline[0], *gray, *pipeline[1:]], preprocessor
    if kind not in _ARRAYS:
        raise ExportError(
            f'its test images come from {kind}, and it is not known how to make one of them from a file. Known are '
            f'datasets whose pipeline begins with LoadImageFromFile, and {", ".join(_ARRAYS)}'
        )
    arrays = _ARRAYS[kind]
    reading = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(arrays.size, arrays.size), backend='pillow'),  # whose bilinear does not alias
    ]
    if arrays.is_gray:
        reading.append(_gray())
    else:
        preprocessor.to_rgb = not preprocessor.get('to_rgb', False)
    for key in ('mean', 'std'):
        if preprocessor.get(key) is not None:
            preprocessor[key] = [value * 255 / arrays.brightest for value in preprocessor[key]]
    return [*reading, *pipeline], preprocessor


def _gray() -> dict:
    # weights that add up to 1 without rounding: a gray file, read as three equal channels, keeps its values
    return dict(type='RandomGrayscale', prob=1.0, channel_weights=(1, 2, 1))


def build_strictly(cfg: Config, weights: dict[str, Tensor], classes: Sequence[str], source: str) -> nn.Module:
    """Build a config's classifier in eval mode and load it strictly; mmpretrain would load only what fits.

    Args:
        cfg: From :func:`inference_config`.
        weights: The student's, by key.
        classes: Names of its classes; empty if they are not known.
        source: What the weights come from, for messages.

    Raises:
        ExportError: If the network is no classifier of mmpretrain's.
        ValueError: If weights are missing, left over or of another shape, or classes and their names differ in number.
    """
    with MODELS.switch_scope_and_registry(cfg.model.get('_scope_') or 'mmpretrain') as registry:
        kind = registry.get(str(cfg.model.type))
    if kind is None or not issubclass(kind, BaseClassifier):
        raise ExportError(
            f"it is a {cfg.model.type}, and mmpretrain's inferencer predicts only with mmpretrain's classifiers"
        )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        network = MODELS.build(copy.deepcopy(cfg.model))  # it is changed
    load_weights(network, weights, source, 'Give the config that it was trained with by --config')
    network.eval()
    predicted = predicted_classes(network)
    if classes and predicted not in (None, len(classes)):
        raise ValueError(
            f'{source} names {len(classes)} classes ({", ".join(classes[:3])}, ...), and its student '
            f'predicts {predicted}. Give the config that it was trained with by --config'
        )
    return network


def write_config(cfg: Config, student: Path) -> Path:
    """Write the config next to a student's file; it finds that file in its own folder, wherever the two are moved.

    Raises:
        FileExistsError: If a file of this name exists that is not an exported student's config.
    """
    target = student.with_suffix('.py')
    if target.exists() and not target.read_text(errors='replace').startswith(_MADE_BY):
        raise FileExistsError(
            f"{target} exists already and is not an exported student's config. Choose another name for the student "
            'with --out-path'
        )
    text = f"{_MADE_BY}\nload_from = '{{{{ fileDirname }}}}/{student.name}'\n{cfg.pretty_text}"
    with whole_file(target) as file:
        file.write(text.encode())
    return target


def lines_to_predict(cfg: Config, target: Path, named: bool) -> str:
    """Return a script that prints the class of ``picture.jpg``.

    Args:
        cfg: From :func:`inference_config`.
        target: Its file.
        named: Whether names of the classes are known; else the script prints the class's number.
    """
    first = 'import mmwsl.registry\n' if needs_mmwsl(cfg) else ''
    return (
        f'{first}from mmpretrain import ImageClassificationInferencer\n\n'
        f'predict = ImageClassificationInferencer({str(target)!r})\n'
        f"print(predict('picture.jpg')[0][{'pred_class' if named else 'pred_label'!r}])\n"
    )


class _FromPixels(nn.Module):
    """Computes logits from RGB (or gray) pixels: a normalisation and a classifier."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, preprocessor = network, network.data_preprocessor
        # files are BGR, and without to_rgb the network sees this order
        self.turns = not preprocessor.to_rgb
        self.mean, self.std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))

    def forward(self, images: Tensor) -> Tensor:
        if self.turns and images.shape[1] == 3:
            images = images.flip(1)
        return self.network(images if self.mean is None else (images - self.mean) / self.std, mode='tensor')


def write_onnx(network: nn.Module, cfg: Config, classes: Sequence[str], target: Path) -> tuple[int, ...]:
    """Write a classifier as ONNX, after checking that ONNX Runtime computes the same logits as torch.

    The graph takes ``images``, float32 pixels from 0 to 255 in the order RGB (or gray), (N, C, H, W) for any N, and
    returns ``logits``, (N, number of classes). It includes the normalisation, and its metadata the class names as JSON.

    Args:
        network: From :func:`build_strictly`.
        cfg: From :func:`inference_config`.
        classes: Names of the classes; empty if they are not known.
        target: The file.

    Returns:
        Shape of an image: (C, H, W).

    Raises:
        ImportError: If a package is missing; the message names the extra.
        ValueError: If the logits differ by more than a thousandth of the largest; no file is written.
    """
    with from_extra('onnx'):
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    shape, model = _shape_of_input(cfg), _FromPixels(network).eval()
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns about its own code
        expected = model(images)
        program: Any = torch.onnx.export(
            model,
            (images,),
            input_names=['images'],
            output_names=['logits'],
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim('batch')},),
        )
    proto = program.model_proto
    proto.metadata_props.add(key='classes', value=json.dumps(list(classes)))
    written = proto.SerializeToString()
    session = onnxruntime.InferenceSession(written, providers=['CPUExecutionProvider'])
    logits = torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])
    error = (logits - expected).abs().max() / expected.abs().max()
    if not error <= _ONNX_TOLERANCE:
        raise ValueError(
            f"ONNX Runtime's logits differ from torch's by {error:.1%} of the largest, expected at most "
            f'{_ONNX_TOLERANCE:.1%}, so {target} was not written. Try another version of torch'
        )
    with whole_file(target) as file:
        file.write(written)
    return shape


def _shape_of_input(cfg: Config) -> tuple[int, ...]:
    """Return the shape that the test transforms give to a large image."""
    image = np.zeros((512, 512, 3), np.uint8)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        transforms = Compose([TRANSFORMS.build(step) for step in cfg.test_dataloader.dataset.pipeline[1:]])
    made = transforms(dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2]))
    return tuple(made['inputs'].shape)
