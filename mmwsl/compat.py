"""Workarounds for the packages that mmwsl is built on, one function each.

Importing this module, as :mod:`mmwsl.registry` and every module above it does, applies them once. Each changes nothing
if the problem is absent, and its docstring names the symptom, the versions in which it was seen, and the change
upstream that makes the function unnecessary.
"""

from __future__ import annotations

import datetime
import errno
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
import threading
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions, version
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from urllib.parse import urlparse

if _missing := [
    name
    for name in ('mmengine', 'mmcv', 'mmpretrain', 'mmrazor', 'joblib', 'torchvision', 'scipy')
    if importlib.util.find_spec(name) is None
]:
    raise ImportError(
        f'mmwsl needs {", ".join(_missing)} (only mmwsl.functional works without), which was not found. '
        'Install one of two sets, never one over the other: mmwsl[onedl] (the maintained forks) or '
        "mmwsl[openmmlab] (OpenMMLab's own releases)"
    )

import mmcv
import mmengine.config.config as mmengine_config
import mmengine.fileio.handlers.yaml_handler as mmengine_yaml
import mmengine.hub.hub as mmengine_hub
import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from mmengine.registry import MODELS, Registry

# Operators of torchvision's compiled library that its Python files use when they are imported.
_TORCHVISION_OPERATORS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
_MMRAZOR_NEWEST_MMCV = '2.1.0'
_libraries: list[torch.library.Library] = []  # a Library undoes its definitions when it is garbage-collected
_safe_globals_lock = threading.RLock()  # torch keeps one set for all threads; a load may start another load


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint holds more than weights and the data that mmengine stores with them."""


def ready_the_stack() -> None:
    """Apply all workarounds: mmpretrain (also as mmcls), mmrazor, mmdet and mmseg can then be imported, and mmengine
    reads checkpoints and YAML files without running code from them.
    """
    make_torchvision_importable()
    leave_multimodal_networks_out()
    make_dense_packages_importable()
    let_mmcls_mean_mmpretrain()
    make_mmrazor_importable()
    load_only_weights()
    read_yaml_as_data()
    import_quietly()


def import_quietly(*modules: str) -> None:
    """Import modules, by default those of mmpretrain, without messages about optional parts that are not used.

    Symptom: ``Could not import OneDL`` (OneDL's forks print it instead of logging it at level DEBUG) and ``UserWarning:
    Fail to import ``MultiScaleDeformableAttention``` (mmcv-lite, which has no operators). Upstream: a logger's name in
    that call, and a warning only when the attention is built.
    """
    printed = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(printed):
        warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
        for module in modules or ('mmcv.cnn.bricks.transformer', 'mmpretrain.datasets'):
            importlib.import_module(module)
    other = [line for line in printed.getvalue().splitlines() if not line.startswith('Could not import OneDL')]
    if other:
        print(*other, sep='\n')


def make_torchvision_importable() -> None:
    """Define two operator schemas if torchvision's compiled library cannot be loaded, and warn once.

    Symptom: ``RuntimeError: operator torchvision::nms does not exist`` from ``import torchvision`` (and so from
    ``import mmpretrain``), if a torchvision wheel built for CUDA is installed with a CPU build of torch (0.28.0 with
    2.13.0+cpu). The image transforms are plain Python and need no operator. Upstream: a CPU wheel of torchvision on the
    package index, or an import that tolerates a missing library.
    """
    try:
        importlib.import_module('torchvision')
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
        _forget_modules('torchvision')
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for schema in _TORCHVISION_OPERATORS:
            name = schema.partition('(')[0]
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)
        _libraries.append(library)
        importlib.import_module('torchvision')
        warnings.warn(
            f'torchvision {version("torchvision")} was built for another torch than {torch.__version__}, the installed '
            'one. mmwsl works regardless; `import mmpretrain` in a script without mmwsl fails with '
            f'"{error}". Install both from one index: pip install --force-reinstall --no-deps --index-url '
            'INDEX torch torchvision, or in a clone: make clean, then make install TORCH_INDEX=INDEX',
            stacklevel=2,
        )


def leave_multimodal_networks_out() -> None:
    """Import mmpretrain without its multimodal networks if Transformers no longer has their base classes.

    Symptom: ``TypeError: NoneType takes no arguments`` from ``import mmpretrain``, with pycocotools and transformers
    5.17 or 5.24. The networks' names are then registered as without Transformers: building one raises an error that
    names the missing package. Upstream: networks that are only defined if their base class exists.
    """
    if not (_is_installed('transformers') and _is_installed('pycocotools')) or 'mmpretrain' in sys.modules:
        return
    try:
        importlib.import_module('transformers.pytorch_utils').find_pruneable_heads_and_indices  # noqa: B018
    except (ImportError, AttributeError):
        package = importlib.util.find_spec('mmpretrain')
        assert package is not None and package.submodule_search_locations
        name = 'mmpretrain.utils.dependency'
        spec = importlib.util.spec_from_file_location(
            name, Path(package.submodule_search_locations[0]) / 'utils/dependency.py'
        )
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.WITH_MULTIMODAL = False
        sys.modules[name] = module


def make_dense_packages_importable() -> None:
    """Make mmdet and mmseg importable without mmcv's compiled operators, and mmseg's configs usable as ``_base_``.

    Symptom: ``ModuleNotFoundError: No module named 'mmcv._ext'`` from ``import mmdet.models`` (and, on mmcv-lite, from
    ``import mmseg.models``), though most networks need no operator; and, with onedl-mmengine 0.10.12, ``_base_ =
    ['mmseg::...']`` looks for a distribution named mmsegmentation. Upstream: operators that are imported when they are
    called, or wheels of mmcv with operators; and a fork that uses its own distribution's name.
    """
    installed = [name for name in ('mmdet', 'mmseg') if _is_installed(name)]
    if installed and importlib.util.find_spec('mmcv._ext') is None:
        sys.modules['mmcv._ext'] = _NoOperators()
        _forget_modules('mmcv.ops')
        layers: Any = sys.modules.get('mmcv.cnn.bricks.transformer')
        if layers is not None and not hasattr(layers, 'MultiScaleDeformableAttention'):  # imported before this
            layers.MultiScaleDeformableAttention = importlib.import_module(
                'mmcv.ops.multi_scale_deform_attn'
            ).MultiScaleDeformableAttention
    from mmengine.config.utils import MODULE2PACKAGE

    for name in installed:
        distributions = packages_distributions().get(name, [])
        if distributions and MODULE2PACKAGE.get(name) not in distributions:
            MODULE2PACKAGE[name] = distributions[0]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # None in sys.modules
        return False


class _NoOperators(types.ModuleType):
    """Replacement of mmcv's compiled operators: nms works; calling another one raises an error with instructions."""

    def __init__(self) -> None:
        super().__init__('mmcv._ext', 'Stands in for operators that are not built.')
        self.__spec__ = ModuleSpec('mmcv._ext', None)
        self.nms = nms

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith('__'):
            raise AttributeError(name)
        return functools.partial(_say_not_compiled, name)

    def get_compiler_version(self) -> str:
        return 'not compiled'

    get_compiling_cuda_version = get_compiler_version


_INSTEAD = {  # alternatives to an operator that is not built
    'sigmoid_focal_loss': 'or train on the CPU, where mmdet and mmseg compute the focal loss without it',
    'softmax_focal_loss': 'or train on the CPU, where mmdet and mmseg compute the focal loss without it',
    'roi_align': "or set use_torchvision=True in the RoIAlign layer's config",
    'softnms': "or set nms=dict(type='nms', ...) in the test_cfg",
}


def _say_not_compiled(operator: str, *args: Any, **kwargs: Any) -> Any:
    instead = next((words for name, words in _INSTEAD.items() if operator.startswith(name)), '')
    raise NotImplementedError(
        f"mmcv's operator {operator!r} is not built here. Build mmcv with its operators "
        f'(docs/dense.md has the command){", " if instead else ""}{instead}'
    )


def nms(bboxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int = 0) -> torch.Tensor:
    """Greedy non-maximum suppression, like mmcv's compiled operator of this name.

    Args:
        bboxes: Corners (x1, y1, x2, y2) in pixels. Shape: (N, 4).
        scores: Scores of the boxes. Shape: (N, ).
        iou_threshold: Overlap with a better box above which a box is dropped, as intersection over union.
        offset: 1 if a box from 0 to 0 is one pixel wide, else 0.

    Returns:
        Indices of the remaining boxes, best first, int64. Shape: (K, ).
    """
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = bboxes[order].float().cpu().numpy().T
    areas = (x2 - x1 + offset) * (y2 - y1 + offset)
    left, kept = np.arange(len(order)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left]) + offset
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left]) + offset
        overlap = width.clip(0) * height.clip(0)
        with np.errstate(invalid='ignore'):  # two boxes without area: 0 / 0, which is not above the threshold
            iou = overlap / (areas[best] + areas[left] - overlap)
        left = left[~(iou > np.float32(iou_threshold))]
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


# Names of mmcls 1.0.0rc5 and rc6 that are different in mmpretrain 1.2.
MMCLS_NAMES = {  # registered, by registry
    'MODELS': {'LinearReduction': 'LinearNeck'},
    'TRANSFORMS': {'PackClsInputs': 'PackInputs'},
    'VISUALIZERS': {'ClsVisualizer': 'UniversalVisualizer'},
}
MMCLS_OBJECTS = {  # imported
    'ClsDataSample': 'DataSample',
    'ClsVisualizer': 'UniversalVisualizer',
    'LinearReduction': 'LinearNeck',
    'PackClsInputs': 'PackInputs',
    'ToNumpy': 'PILToNumpy',
    'ToPIL': 'NumpyToPIL',
}
MMCLS_MODULES = {
    'apis.inference': 'apis',
    'models.necks.reduction': 'models.necks.linear_neck',
    'structures.cls_data_sample': 'structures.data_sample',
    'visualization.cls_visualizer': 'visualization.visualizer',
}
MMDET_CONFIGS = {  # those that MMRazor's configs name
    f'faster_rcnn/faster_rcnn_{name}_coco.py': f'faster_rcnn/faster-rcnn_{name}_coco.py'
    for name in ('r50_fpn_1x', 'r101_fpn_2x')
}
MMCLS_CONFIGS = {
    'beit/beit-base-p16_8xb64_in1k.py': 'beit/benchmarks/beit-base-p16_8xb64_in1k.py',
    'beitv2/beitv2-base-p16_8xb64_in1k.py': 'beitv2/benchmarks/beit-base-p16_8xb64_in1k.py',
    'deit/deit-base-distilled_ft-16xb32_in1k-384px.py': 'deit/deit-base-distilled_16xb32_in1k-384px.py',
    'deit/deit-base-distilled_pt-16xb64_in1k.py': 'deit/deit-base-distilled_16xb64_in1k.py',
    'deit/deit-base_ft-16xb32_in1k-384px.py': 'deit/deit-base_16xb32_in1k-384px.py',
    'deit/deit-base_pt-16xb64_in1k.py': 'deit/deit-base_16xb64_in1k.py',
    'deit/deit-small-distilled_pt-4xb256_in1k.py': 'deit/deit-small-distilled_4xb256_in1k.py',
    'deit/deit-small_pt-4xb256_in1k.py': 'deit/deit-small_4xb256_in1k.py',
    'deit/deit-tiny-distilled_pt-4xb256_in1k.py': 'deit/deit-tiny-distilled_4xb256_in1k.py',
    'deit/deit-tiny_pt-4xb256_in1k.py': 'deit/deit-tiny_4xb256_in1k.py',
    'mixmim/mixmim-base_8xb64_in1k.py': 'mixmim/benchmarks/mixmim-base_8xb64_in1k.py',
    'swin_transformer/swin-large_8xb8_cub_384px.py': 'swin_transformer/swin-large_8xb8_cub-384px.py',
    'vision_transformer/vit-base-p16_ft-4xb544-ipu_in1k.py': 'vision_transformer/vit-base-p16_4xb544-ipu_in1k.py',
    'vision_transformer/vit-base-p16_ft-64xb64_in1k-384.py': 'vision_transformer/vit-base-p16_64xb64_in1k-384px.py',
    'vision_transformer/vit-base-p16_pt-32xb128-mae_in1k-224.py': 'vision_transformer/vit-base-p16_32xb128-mae_in1k.py',
    'vision_transformer/vit-base-p16_pt-64xb64_in1k-224.py': 'vision_transformer/vit-base-p16_64xb64_in1k.py',
    'vision_transformer/vit-base-p32_ft-64xb64_in1k-384.py': 'vision_transformer/vit-base-p32_64xb64_in1k-384px.py',
    'vision_transformer/vit-base-p32_pt-64xb64_in1k-224.py': 'vision_transformer/vit-base-p32_64xb64_in1k.py',
    'vision_transformer/vit-large-p16_ft-64xb64_in1k-384.py': 'vision_transformer/vit-large-p16_64xb64_in1k-384px.py',
    'vision_transformer/vit-large-p16_pt-64xb64_in1k-224.py': 'vision_transformer/vit-large-p16_64xb64_in1k.py',
    'vision_transformer/vit-large-p32_ft-64xb64_in1k-384.py': 'vision_transformer/vit-large-p32_64xb64_in1k-384px.py',
    'vision_transformer/vit-large-p32_pt-64xb64_in1k-224.py': 'vision_transformer/vit-large-p32_64xb64_in1k.py',
}


def let_mmcls_mean_mmpretrain() -> None:
    """Let ``mmcls`` mean mmpretrain in imports, in types and scopes of a config, and before ``::``.

    Symptom: ``ModuleNotFoundError: mmcls is not installed`` from every classification config of mmrazor 1.0.0, and from
    building its classes that derive from mmcls's (DeiTClsHead, PackCRDClsInputs). mmcls became mmpretrain in 2023 and
    does not run with current versions. An installed mmcls is not touched. Upstream: configs of mmrazor that name
    mmpretrain.
    """
    if _is_installed('mmcls'):
        return
    sys.meta_path.append(_FindMmcls())
    for module in (mmengine_config, mmengine_hub):
        read_path = module._get_package_and_cfg_path
        module._get_package_and_cfg_path = lambda cfg_path, read=read_path: read(config_of_today(cfg_path))
    registries = importlib.import_module('mmpretrain.registry')
    for kind in MMCLS_NAMES:  # a config may name them without a scope
        getattr(registries, kind)._locations.append(f'mmcls.moved_{kind}')


def config_of_today(cfg_path: str) -> str:
    """Return the current path of a config that is now in mmpretrain instead of mmcls, or that mmdet 3 renamed; other
    paths are returned unchanged."""
    package, _, path = cfg_path.partition('::')
    if package == 'mmdet':
        return f'mmdet::{MMDET_CONFIGS.get(path, path)}'
    return f'mmpretrain::{MMCLS_CONFIGS.get(path, path)}' if package == 'mmcls' else cfg_path


class _FindMmcls(MetaPathFinder, Loader):
    """Finder of the modules of mmcls, which is asked after all other finders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != 'mmcls' and not name.startswith('mmcls.'):
            return None
        if not name.startswith('mmcls.moved_') and importlib.util.find_spec(_in_mmpretrain(name)) is None:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _ModuleOfMmcls(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        _, _, kind = module.__name__.partition('.moved_')
        if kind:
            _register_moved_names(kind)
            return
        importlib.import_module(_in_mmpretrain(module.__name__))
        if module.__name__ == 'mmcls.registry':
            _add_registries_of_mmcls()


class _ModuleOfMmcls(types.ModuleType):
    """A module of mmpretrain under its old name, with the old names of its contents."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') and name != '__all__':
            raise AttributeError(name)
        module = sys.modules[_in_mmpretrain(self.__name__)]
        found = getattr(module, name if hasattr(module, name) else MMCLS_OBJECTS.get(name, name))
        return _with_patch_tokens(found) if name == 'VisionTransformerClsHead' else found


@functools.cache
def _with_patch_tokens(head: type) -> type:
    """Pass (patch tokens, class token, distillation token) to heads that derive from mmcls's, as these expect.

    Symptom: ``not enough values to unpack (expected 3, got 2)`` from mmrazor's DeiTClsHead (1.0.0), since mmpretrain's
    backbone leaves the patch tokens out, which the head does not use.
    """

    def call(self: Any, feats: Any, *args: Any, **kwargs: Any) -> Any:
        *others, last = feats
        tokens = (None, *last) if isinstance(last, tuple | list) and len(last) == 2 else last
        return head.__call__(self, (*others, tokens), *args, **kwargs)

    return type(head.__name__, (head,), {'__call__': call, '__module__': head.__module__})


def _in_mmpretrain(name: str) -> str:
    _, _, rest = name.partition('.')
    return '.'.join(('mmpretrain', MMCLS_MODULES.get(rest, rest))).rstrip('.')


def _register_moved_names(kind: str) -> None:
    registry = getattr(importlib.import_module('mmpretrain.registry'), kind)
    for old, new in MMCLS_NAMES[kind].items():
        if old not in registry.module_dict:  # a user's own
            registry.register_module(name=old, module=registry.get(new))


def _add_registries_of_mmcls() -> None:
    for registry in vars(importlib.import_module('mmpretrain.registry')).values():
        if isinstance(registry, Registry) and registry.scope == 'mmpretrain':
            _RegistryOfMmcls(registry)


class _RegistryOfMmcls(Registry):
    """Registry of the scope ``mmcls``, with the contents of mmpretrain's."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry.name, parent=registry.parent, scope='mmcls')
        self._of_mmpretrain = registry

    def get(self, key: str) -> Any:
        scope, name = self.split_scope_key(key)
        return self._of_mmpretrain.get(name if scope == 'mmcls' else key)


def make_mmrazor_importable() -> None:
    """Import mmrazor in spite of its version check and its quantization package."""
    with _mmcv_as_mmrazor_expects():
        importlib.import_module('mmrazor')
    _stand_in_for_quantization()
    _name_the_preprocessor()


def _name_the_preprocessor() -> None:
    """Register mmpretrain's ClsDataPreprocessor in mmrazor's scope.

    Symptom: ``there is no model 'ClsDataPreprocessor'`` from ``dict(type='mmpretrain.ImageClassifier', ...)`` within a
    model of ``_scope_='mmrazor'`` (mmpretrain 1.2.0, onedl-mmpretrain 1.3.6): the classifier names its default without
    a scope, which mmcls did not. Upstream: a default of mmpretrain with its scope.
    """
    models = importlib.import_module('mmrazor.registry').MODELS
    name = 'ClsDataPreprocessor'
    if name not in models.module_dict:
        models.register_module(name=name, module=_cls_data_preprocessor)


def _cls_data_preprocessor(**kwargs: Any) -> Any:
    return MODELS.build(dict(type='mmpretrain.ClsDataPreprocessor', **kwargs))


@contextmanager
def _mmcv_as_mmrazor_expects() -> Iterator[None]:
    """Pretend that mmcv has a version that mmrazor accepts, while mmrazor is imported.

    Symptom: ``AssertionError: MMCV==2.3.6 is used but incompatible`` from ``import mmrazor`` (1.0.0, which asserts
    mmcv <= 2.1.0 and works with later ones). Upstream: a release of mmrazor with a wider range.
    """
    version = mmcv.__version__
    from mmengine.utils import digit_version

    if digit_version(version) <= digit_version(_MMRAZOR_NEWEST_MMCV):
        yield
        return
    mmcv.__version__ = _MMRAZOR_NEWEST_MMCV
    try:
        yield
    finally:
        mmcv.__version__ = version


def _stand_in_for_quantization() -> None:
    """Replace mmrazor's quantization package by a placeholder if it cannot be imported.

    Symptom: ``ImportError: `torch>=1.13` is not installed properly`` from ``import mmrazor.models`` (1.0.0 with torch
    >= 2.0, in which torch.ao.quantization lost the names that mmrazor imports). Distillation never uses the package.
    Upstream: a mmrazor that follows torch, or imports the package only when a quantizer is built.
    """
    name = 'mmrazor.structures.quantization'
    try:
        importlib.import_module(name)
    except ImportError:
        _forget_modules('mmrazor.structures')
        placeholder = types.ModuleType(name, 'Stands in for a package that this torch cannot import.')
        # names that mmrazor's own modules import from it
        vars(placeholder).update(BackendConfigs={}, QConfigHandler=_NoQuantization)
        sys.modules[name] = placeholder


class _NoQuantization:
    """Placeholder that raises an error with the reason when it is used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(
            f'mmrazor 1.0.0 cannot quantize with torch {torch.__version__}: its quantization package '
            'needs torch 1.13. Distillation, pruning and search are not affected'
        )


def _forget_modules(package: str) -> None:
    """Drop the modules of an import that failed half-way."""
    for name in list(sys.modules):
        if name == package or name.startswith(f'{package}.'):
            del sys.modules[name]


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Name the extra to install if an import inside the context fails.

    Raises:
        ImportError: If the import fails because a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ImportError(f'{missing.name} is not installed. Install mmwsl[{extra}], which includes it') from missing


def load_only_weights() -> None:
    """Let mmengine load its own checkpoints with ``weights_only=True``, and refuse all files that need more.

    Symptom: mmengine 0.10.7 cannot resume with torch >= 2.6 (``Weights only load failed``), because its message hub is
    not on torch's list of safe classes; the maintained fork (0.10.12) falls back to unpickling whatever the file holds,
    which runs code from an untrusted file; both download with ``weights_only=False``. Upstream: a fixed list without a
    fallback.
    """
    loader = _WeightsOnlyTorch()
    for name, replacement in (('torch', loader), ('_safe_torch_load', loader.load), ('load_url', loader.load_url)):
        if hasattr(mmengine_checkpoint, name):
            setattr(mmengine_checkpoint, name, replacement)


class _WeightsOnlyTorch(types.ModuleType):
    """The module torch for mmengine's checkpoint module, with a ``load`` that refuses to run code."""

    def __init__(self) -> None:
        super().__init__('torch')

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def load(self, f: Any, map_location: Any = None, **_: Any) -> Any:
        compare_checksums(f)
        return _only_weights(functools.partial(torch.load, f, map_location=map_location), f)

    def load_url(
        self, url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True, **_: Any
    ) -> Any:
        file = downloaded(url, model_dir, progress)
        compare_checksums(file)
        return _only_weights(
            functools.partial(  # reads the downloaded file, also in torch's old format
                torch.hub.load_state_dict_from_url, url, str(file.parent), map_location, progress, file_name=file.name
            ),
            file,
        )


def downloaded(url: str, folder: str | Path | None = None, progress: bool = False) -> Path:
    """Return the local file of a checkpoint's address, after downloading it if it is missing.

    Raises:
        FileNotFoundError: If it cannot be downloaded, for example without a network.
    """
    file = kept_download(url, folder)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=progress)
        except OSError as error:  # URLError among them
            name = PurePosixPath(urlparse(url).path).name
            raise FileNotFoundError(
                f'{url} was not downloaded ({error}). Without a network, copy {name} here as {file}'
            ) from error
    return file


def kept_download(url: str, folder: str | Path | None = None) -> Path:
    """Return the local path for a checkpoint's address.

    Symptom: torch.hub, and so mmengine (0.10.7 and 0.10.12), names a download by the last part of its address, so
    ``.../a/model.pth`` is mistaken for ``.../b/model.pth``. Here the name has a hash of the whole address. A file that
    torch.hub has stored is used if its name ends with ``-<hash of its content>``, as OpenMMLab's, torchvision's and
    timm's do, and the hash is right. Upstream: a folder for each address.
    """
    folder = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'))
    name = PurePosixPath(urlparse(url).path).name
    kept, stated = folder / name, re.search(r'-([0-9a-f]{8,64})\.', name)
    if stated and kept.is_file() and sha256(kept).startswith(stated[1]):
        return kept
    return folder / f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}'


def sha256(file: str | Path) -> str:
    """Return the SHA-256 of a file, as sha256sum prints it."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def compare_checksums(file: Any) -> None:
    """Compare the checksums in a file of torch with its content.

    Symptom: torch (2.6 and 2.13) writes a CRC-32 of each tensor but never checks it: a flipped bit is loaded as another
    weight. Files of torch < 1.6, and those written under ``set_crc32_options(False)``, have no checksums. Upstream: a
    ``torch.load`` that checks them.

    Raises:
        RuntimeError: If they do not match.
    """
    start = file.seek(0, os.SEEK_CUR) if hasattr(file, 'seek') else 0
    try:
        if not zipfile.is_zipfile(file):  # truncated, or in the old format: torch tells which
            return
        with zipfile.ZipFile(file) as archive:
            misfit: object = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except Exception as error:  # whatever zipfile raises for damage
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        misfit = error
    finally:
        if hasattr(file, 'seek'):
            file.seek(start)
    if misfit is not None:
        raise RuntimeError(
            f'{file} was not loaded: it is damaged (the checksum of {misfit} does not match). Use '
            'another copy of it; a run can resume from an older checkpoint with --resume CKPT'
        )


_SafeLoader: Any = getattr(
    mmengine_yaml.yaml, 'CSafeLoader', mmengine_yaml.yaml.SafeLoader
)  # written in C, ten times as fast


class _DataLoader(_SafeLoader):
    """Loader of YAML with the tuples that mmengine writes, but no other Python objects."""

    def tuple_of(self, node: Any) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def refuse(self, suffix: str, node: Any) -> Any:
        raise ValueError(
            f'!!python/{suffix} was not read, because it could run code{node.start_mark}. A YAML file can '
            'only hold values; write everything else as a .py config'
        )


_DataLoader.add_constructor('tag:yaml.org,2002:python/tuple', _DataLoader.tuple_of)
_DataLoader.add_multi_constructor('tag:yaml.org,2002:python/', _DataLoader.refuse)


def read_yaml_as_data() -> None:
    """Let mmengine read YAML files, including configs, without running the objects that they name.

    Symptom: ``!!python/object/apply:os.system`` in a YAML config runs when the config is read, since mmengine (0.10.7
    and 0.10.12) reads with PyYAML's unsafe loader. Upstream: a safe one.
    """
    mmengine_yaml.Loader = _DataLoader


@contextmanager
def _allowed(classes: list[Any]) -> Iterator[None]:
    """torch's ``safe_globals`` for one thread at a time, which keeps the classes that were allowed before."""
    with _safe_globals_lock:
        before = set(torch.serialization.get_safe_globals())
        with torch.serialization.safe_globals([entry for entry in classes if entry not in before]):
            yield


def _only_weights(load: Callable[..., Any], source: Any) -> Any:
    with _allowed(_stored_by_mmengine()):
        try:
            return _without_code(load(weights_only=True))
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(
                f'{source} was not loaded: it is damaged, or holds more than weights and the data that mmengine '
                'stores, and reading that could run code. If you trust it, save its weights alone, e.g. with '
                f'torch.save(checkpoint["state_dict"], ...) (or "model"). torch says: {error}'
            ) from error
        except (EOFError, RuntimeError, OSError, LookupError, ValueError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek past the end is
                raise
            if 'TorchScript' in str(error):
                raise UnsafeCheckpointError(
                    f'{source} is a TorchScript archive, which is a program and not a checkpoint: '
                    'load it with torch.jit.load and save its state_dict()'
                ) from error
            if 'memory' in str(error) or _opens(load):
                raise  # the file is intact: too little memory, or a missing device
            raise RuntimeError(
                f'{source} was not loaded: it is damaged, perhaps truncated. Use another copy of '
                'it (delete it if it was downloaded); a run can resume from an older checkpoint with '
                f'--resume CKPT. torch says: {error}'
            ) from error


def _without_code(checkpoint: Any) -> Any:
    """Drop ``meta.config``, which mmengine does not write but runs as Python when it resumes."""
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    return checkpoint


def _opens(load: Callable[..., Any]) -> bool:
    """Whether a file can be loaded to the CPU."""
    try:
        load(weights_only=True, map_location='cpu')
    except Exception:  # the first error is reported
        return False
    return True


def _stored_by_mmengine() -> list[Any]:
    """Classes in a checkpoint of mmengine, apart from weights: histories of the log, made of numpy arrays, and the data
    in a dataset's metainfo or a hook's state. Constructing them has no side effects."""
    core = np._core if hasattr(np, '_core') else np.core  # numpy 2 renamed it
    return [
        HistoryBuffer,
        OneCycleParamScheduler,
        ConfigDict,
        PurePosixPath,
        PureWindowsPath,
        PosixPath,
        WindowsPath,
        datetime.date,
        datetime.datetime,
        datetime.timedelta,
        frozenset,
        np.ndarray,
        np.dtype,
        core.multiarray._reconstruct,
        core.multiarray.scalar,
        (core.multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
        (core.multiarray.scalar, 'numpy.core.multiarray.scalar'),
        *{type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?SU'},
        (_stored_method, 'builtins.getattr'),
    ]


_STORED_METHODS = {  # methods to which mmengine's objects hold references
    HistoryBuffer: ('min', 'max', 'mean', 'current'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def _stored_method(owner: type, name: str) -> Any:
    """Replacement of ``getattr`` for the methods that mmengine's checkpoints need, and no others."""
    if name not in _STORED_METHODS.get(owner, ()):
        raise pickle.UnpicklingError(f'it asks for getattr({owner!r}, {name!r}), which mmengine never stores')
    return getattr(owner, name)


def restart_batches(loop: Any) -> None:
    """Let a loop by iterations read batches from its sampler's current position, without loading the ones before it.

    Symptom: a resumed IterBasedTrainLoop of mmengine 0.10.7 loads every batch on which the run was already trained, and
    its workers start before the checkpoint is read. Upstream: a loop that starts late and lets the sampler ``skip``, as
    in onedl-mmengine 0.10.12.
    """
    fresh = type(loop.dataloader_iterator)(loop.dataloader)
    loop.dataloader_iterator = fresh if hasattr(fresh, 'skip_iter') else _skipping(fresh, loop.iter)


def number_batches_from(loop: Any, start: int) -> None:
    """Let a loop by epochs number its batches from ``start``; 0 restores the default.

    Symptom: an EpochBasedTrainLoop of mmengine (0.10.7 and 0.10.12) that starts within an epoch passes batch index 0 to
    its hooks, so none of them notices the end of the epoch. Upstream: a loop that knows its starting position.
    """
    if start:
        loop.run_iter = lambda index, batch: type(loop).run_iter(loop, start + index, batch)
    else:
        vars(loop).pop('run_iter', None)


def _skipping(batches: Iterator[Any], steps: int) -> Iterator[Any]:
    yield from itertools.repeat(None, steps)
    yield from batches


def distribute_without_cuda(cfg: ConfigDict) -> None:
    """Start the process group that mmengine cannot start on a CPU build of torch.

    Symptom: with ``--launcher`` and without CUDA, ``init_dist`` calls ``torch.cuda.set_device`` and the Runner passes
    ``device_ids=[LOCAL_RANK]`` to DistributedDataParallel (mmengine 0.10.7 and 0.10.12). The Runner keeps a group that
    exists already. Upstream: a branch for CPU in both places.

    Args:
        cfg: Config of the run; its ``model_wrapper_cfg`` is set.
    """
    if cfg.get('launcher', 'none') == 'none' or torch.cuda.is_available():
        return
    wrapper = dict(cfg.get('model_wrapper_cfg') or dict(type='MMDistributedDataParallel', broadcast_buffers=False))
    wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
    wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper
    _name_the_processes(cfg.launcher)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')


def shard_without_cuda(strategy: ConfigDict) -> None:
    """Let FSDP shard over processes on a CPU.

    Symptom: mmengine's FSDPStrategy (0.10.7 and 0.10.12) uses LOCAL_RANK as the number of a GPU, and torch (2.13)
    reports that FSDP needs an accelerator; with ``offload_to_cpu``, which ``state_dict_cfg='full'`` sets, torch ends
    with a segmentation fault when a checkpoint is saved, because the offloaded memory has been freed. Upstream: a
    device given by name, and a copy of that memory.

    Args:
        strategy: ``strategy`` of a config, with ``model_wrapper`` and ``state_dict_cfg``; changed in place.
    """
    if torch.cuda.is_available():
        return
    strategy.model_wrapper.setdefault('device_id', 'cpu')
    if strategy.state_dict_cfg == 'full':
        strategy.state_dict_cfg = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True),
        )


def _name_the_processes(launcher: str) -> None:
    """Set torch's environment variables from those of slurm and Open MPI, as mmengine does on a GPU."""
    own = {'slurm': ('SLURM_PROCID', 'SLURM_NTASKS'), 'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE')}
    if launcher not in own:
        return
    for name, source in zip(('RANK', 'WORLD_SIZE'), own[launcher], strict=True):
        os.environ[name] = os.environ[source]
    os.environ.setdefault('MASTER_PORT', '29500')
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        hosts = subprocess.check_output(['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']], text=True)
        os.environ['MASTER_ADDR'] = hosts.split()[0]


if __name__ == 'mmwsl.compat':  # not if a test loads the file under another name
    ready_the_stack()
