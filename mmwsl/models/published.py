"""Networks as others publish them: told apart by their keys, renamed to mmpretrain's, and built from their shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.utils import make_divisible
from torch import Tensor, nn

from mmwsl.utils.checkpoint import load_weights
from mmwsl.utils.looks_like import looks_like
from mmwsl.utils.text import first_of

Weights = Mapping[str, Tensor]
Replacement = str | Callable[[re.Match], str]

_SMALL = {10: True, 100: True, 1000: False}  # CIFAR-10, CIFAR-100, ImageNet: by classes
_VGG_FEATURES = 512  # at 32 x 32; at 224 x 224 they are 49 times as many
_WIDTHS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4, 2.0)  # of published MobileNetV2


class Layout(NamedTuple):
    """One way to name and nest a network's weights.

    Attributes:
        name: Kind of network, and who publishes it.
        keys: Pattern that each key matches.
        rename: State dict under these keys to one under mmpretrain's.
        network: From a renamed state dict and the size of its images (None: not known) to the config of a classifier.
        needs: Keys without which it is another network whose keys match all the same.
    """

    name: str
    keys: str
    rename: Callable[[Weights], dict[str, Tensor]]
    network: Callable[[Weights, int | None], dict]
    needs: tuple[str, ...] = ()

    def strangers(self, weights: Weights) -> list[str]:
        """Keys that a network of this layout would not have, or would have to have."""
        missing = [key for key in self.needs if key not in weights]
        return [key for key in weights if not re.fullmatch(self.keys, key)] + missing


def convert(weights: Weights) -> tuple[dict[str, Tensor], Layout]:
    """Return weights under mmpretrain's keys, and the layout that was found.

    Args:
        weights: A published state dict. A prefix ``module.`` is left out.

    Raises:
        ValueError: If the keys fit none of the known layouts, or are mmpretrain's; nothing is converted by halves.
    """
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if any(key.startswith('backbone.') for key in weights):
        raise ValueError(
            f"the keys are mmpretrain's already, of {looks_like(weights)}: there is nothing to convert. "
            'Name the file in model.teacher_ckpt of a config with this network'
        )
    strangers = {layout.name: layout.strangers(weights) for layout in LAYOUTS}
    for layout in LAYOUTS:
        if not strangers[layout.name]:
            with _explained(weights, layout):
                return layout.rename(weights), layout
    nearest = min(strangers, key=lambda name: len(strangers[name]))
    raise ValueError(
        f'unknown layout of {len(weights)} keys, which look like {looks_like(weights)}. The nearest is '
        f'{nearest}, but for {first_of(strangers[nearest])}. docs/teachers.md lists what is known, and '
        'what to do with other networks'
    )


def network_of(weights: Weights, layout: Layout, image_size: int | None, source: str) -> tuple[dict, nn.Module]:
    """Build the network that converted weights belong to, in eval mode, and load it strictly.

    Args:
        weights: Under mmpretrain's keys.
        layout: As :func:`convert` found it.
        image_size: Pixels of its images, 32 or 224. None: told by the number of classes, if CIFAR's or ImageNet's.
        source: What the weights come from, for messages.

    Returns:
        The classifier's config, and the classifier.

    Raises:
        ValueError: If its blocks or channels are those of no network here, or its image size cannot be told.
    """
    with _explained(weights, layout):
        config = layout.network(weights, image_size)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        network = MODELS.build(dict(config))
    load_weights(
        network, dict(weights), source, f'Its keys are those of {layout.name}: give a config that it fits by --config'
    )
    network.eval()
    return config, network


@contextmanager
def _explained(weights: Weights, layout: Layout) -> Iterator[None]:
    """Describe a network that is laid out like a known one and has other blocks or channels."""
    try:
        yield
    except (KeyError, IndexError) as error:
        raise ValueError(
            f'it looks like {looks_like(weights)}, laid out as {layout.name}, but no network here has its '
            'blocks and channels. Give a config that has by --config'
        ) from error


# ------------------------------------------------------------------------------------------------------------ renaming

_CLASSIFIER = (r'^(fc|linear|classifier|classifier\.0)\.(?=weight|bias)', 'head.fc.')
_BACKBONE = (r'^(?!head\.|backbone\.)', 'backbone.')


def _by(*renames: tuple[str, Replacement]) -> Callable[[Weights], dict[str, Tensor]]:
    """Rename key by key: patterns and what replaces them, in this order, then classifier and backbone."""

    def rename(weights: Weights) -> dict[str, Tensor]:
        found = {}
        for key, value in weights.items():
            for pattern, replacement in (*renames, _CLASSIFIER, _BACKBONE):
                key = re.sub(pattern, replacement, key)
            found[key] = value
        return found

    return rename


def _stage_of_vgg(convolutions: int, stage: str, layer: str) -> str:
    """mmpretrain counts convolutions and pools throughout; a published stage counts its own layers, three at a time."""
    index, kind = divmod(int(layer), 3)
    return f'features.{int(stage) * (convolutions + 1) + index}.{("conv", "bn")[kind]}'


def _vgg(weights: Weights) -> dict[str, Tensor]:
    """One Sequential counts convolutions, norms, activations and pools; mmpretrain's counts convolutions and pools."""
    convolutions = [int(key.split('.')[1]) for key, value in weights.items() if value.dim() == 4]
    norm = f'features.{convolutions[0] + 1}.running_mean' in weights
    places, place = {}, 0
    for this, following in zip(convolutions, [*convolutions[1:], convolutions[-1]], strict=True):
        places[f'features.{this}.'] = f'features.{place}.conv.'
        places[f'features.{this + 1}.'] = f'features.{place}.bn.'
        place += 2 if following - this > 2 + norm else 1
    flat = next((value.shape[1] for key, value in weights.items() if key == 'classifier.0.weight'), 0)
    hidden: tuple[str, Replacement] = (r'^classifier\.(\d)\.', r'backbone.classifier.\1.')
    if flat == _VGG_FEATURES:
        hidden = (hidden[0], lambda key: f'head.layers.{int(key[1]) // 3}.fc.')
    return _by((r'^features\.\d+\.', lambda key: places[key[0]]), hidden)(weights)


def _shufflenet_v2(stage: str, block: str, kind: str, number: str) -> str:
    """The first block of a stage numbers its two branches through; the others have one branch."""
    halves, place = block == '0', int(number) - 1
    branch, layer = (1, place) if halves and place < 2 else (2, place - 2 * halves)
    return f'layers.{int(stage) - 1}.{block}.branch{branch}.{layer}.{kind}'


# Layers of one Sequential, activations among them, as mmpretrain nests them.
_SHUFFLE_BRANCH = {
    '1': ['0.conv', '0.bn', '1.conv', '1.bn'],
    '2': ['0.conv', '0.bn', '', '1.conv', '1.bn', '2.conv', '2.bn'],
}
_FIRST_BLOCK = {'0.0': '0.conv', '0.1': '0.bn', '1': '1.conv', '2': '1.bn'}  # of MobileNetV2; it has no expansion
_BLOCK = {'0.0': '0.conv', '0.1': '0.bn', '1.0': '1.conv', '1.1': '1.bn', '2': '2.conv', '3': '2.bn'}


def _block_of_mobilenet_v2(block: str, layer: str) -> str:
    """Blocks are counted through; mmpretrain counts them by stage."""
    stages = [(stage, index) for stage, depth in enumerate((1, 2, 3, 4, 3, 3, 1), start=1) for index in range(depth)]
    stage, index = stages[int(block) - 1]
    return f'layer{stage}.{index}.conv.{(_FIRST_BLOCK if block == "1" else _BLOCK)[layer]}.'


_REPVGG = {
    'rbr_dense.conv': 'branch_3x3.conv',
    'rbr_dense.bn': 'branch_3x3.norm',
    'rbr_1x1.conv': 'branch_1x1.conv',
    'rbr_1x1.bn': 'branch_1x1.norm',
    'rbr_identity': 'branch_norm',
}


# ------------------------------------------------------------------------------------------------------------ networks


def _classifier(backbone: dict, weights: Weights, **head: Any) -> dict:
    classes, channels = weights[_last_linear(weights)].shape
    head = {**dict(type='LinearClsHead', in_channels=channels), **head}
    return dict(
        type='ImageClassifier',
        _scope_='mmpretrain',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head={**head, 'num_classes': classes},
    )


def _last_linear(weights: Weights) -> str:
    return [key for key, value in weights.items() if value.dim() == 2 and key.endswith('weight')][-1]


def _is_small(weights: Weights, image_size: int | None) -> bool:
    """Whether a network has the strides for CIFAR's images: these leave no trace in its weights."""
    classes = len(weights[_last_linear(weights)])
    if image_size is None and classes not in _SMALL:
        raise ValueError(
            f'its weights do not tell whether a network with {classes} classes is for small images or for '
            'large ones, which differ in their strides: give --image-size 32 or 224'
        )
    return _SMALL[classes] if image_size is None else image_size < 64


def _blocks(weights: Weights, pattern: str) -> tuple[int, ...]:
    """Number of blocks in each stage."""
    found = {match.groups() for key in weights if (match := re.match(pattern, key))}
    return tuple(count for _, count in sorted(Counter(stage for stage, _ in found).items()))


_DEPTHS: dict[bool, dict[tuple[int, ...], int]] = {  # of ResNets with four stages, by blocks
    True: {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34},
    False: {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152},
}


def _three_stages(blocks: tuple[int, ...], others: int) -> int:
    """Depth of three stages alike, of blocks with two layers each, and other layers."""
    if len(blocks) != 3 or len(set(blocks)) > 1:
        raise KeyError(blocks)
    return 6 * blocks[0] + others


def _resnet(weights: Weights, image_size: int | None) -> dict:
    blocks = _blocks(weights, r'backbone\.layer(\d)\.(\d+)\.')
    is_basic = 'backbone.layer1.0.conv3.weight' not in weights
    if len(blocks) == 3:
        pads = {} if 'backbone.layer2.0.downsample.0.weight' in weights else dict(shortcut='pad')
        return _classifier(
            dict(
                type='mmwsl.CIFARResNet',
                depth=_three_stages(blocks if is_basic else (), 2),
                **_channels(weights, 16),
                **pads,
            ),
            weights,
        )
    depth, kernel = _DEPTHS[is_basic][blocks], weights['backbone.conv1.weight'].shape[-1]
    width, per_group = weights['backbone.layer1.0.conv2.weight'].shape[:2]
    if not is_basic and width > per_group:
        return _classifier(
            dict(type={7: 'ResNeXt'}[kernel], depth=depth, groups=width // per_group, width_per_group=per_group),
            weights,
        )
    expansion = 4 if is_basic else len(weights['backbone.layer1.0.conv3.weight']) // width
    return _classifier(
        dict(
            type={3: 'ResNet_CIFAR', 7: 'ResNet'}[kernel],
            depth=depth,
            **_channels(weights, 64),
            **({} if expansion == 4 else dict(expansion=expansion)),
        ),
        weights,
    )


def _channels(weights: Weights, usual: int) -> dict[str, int]:
    """Channels of a ResNet's input, stem and first stage, as far as they are not the usual ones."""
    stem = weights['backbone.conv1.weight']
    sizes = dict(
        in_channels=(stem.shape[1], 3),
        stem_channels=(len(stem), usual),
        base_channels=(len(weights['backbone.layer1.0.conv1.weight']), usual),
    )
    return {key: value for key, (value, default) in sizes.items() if value != default}


def _wide_resnet(weights: Weights, image_size: int | None) -> dict:
    depth = _three_stages(_blocks(weights, r'backbone\.layer(\d)\.(\d+)\.'), 4)
    width = len(weights['backbone.layer1.0.conv1.weight']) // 16
    return _classifier(dict(type='mmrazor.WideResNet', depth=depth, widen_factor=width), weights)


def _vgg_network(weights: Weights, image_size: int | None) -> dict:
    depth = {8: 11, 10: 13, 13: 16, 16: 19}[sum(value.dim() == 4 for value in weights.values())]
    norm = {'norm_cfg': dict(type='BN')} if 'backbone.features.0.bn.weight' in weights else {}
    backbone = dict(type='VGG', depth=depth, **norm)
    if 'backbone.classifier.6.weight' in weights:
        classes = len(weights['backbone.classifier.6.weight'])
        return dict(
            type='ImageClassifier',
            _scope_='mmpretrain',
            backbone={**backbone, 'num_classes': classes},
            head=dict(type='ClsHead'),
        )
    if 'head.fc.weight' in weights:
        return _classifier(backbone, weights)
    widths = [len(weights[f'head.layers.{index}.fc.weight']) for index in (0, 1)]
    return _classifier(
        backbone, weights, type='StackedLinearClsHead', in_channels=512, mid_channels=widths, dropout_rate=0.5
    )


def _mobilenet_v2(weights: Weights, image_size: int | None) -> dict:
    first, last = (len(weights[f'backbone.{key}.conv.weight']) for key in ('conv1', 'layer7.0.conv.2'))
    width = {(make_divisible(32 * width, 8), make_divisible(320 * width, 8)): width for width in _WIDTHS}[first, last]
    kind = 'mmwsl.SmallImageMobileNetV2' if _is_small(weights, image_size) else 'MobileNetV2'
    return _classifier(dict(type=kind, widen_factor=width), weights)


def _shufflenet_v2_network(weights: Weights, image_size: int | None) -> dict:
    factor = {48: 0.5, 116: 1.0, 176: 1.5, 244: 2.0}[2 * len(weights['backbone.layers.0.0.branch2.0.conv.weight'])]
    kind = 'mmwsl.SmallImageShuffleNetV2' if _is_small(weights, image_size) else 'ShuffleNetV2'
    return _classifier(dict(type=kind, widen_factor=factor), weights)


def _repvgg(weights: Weights, image_size: int | None) -> dict:
    blocks = _blocks(weights, r'backbone\.stage_(\d)\.(\d+)\.')
    first = [weights[f'backbone.stage_{stage}.0.branch_3x3.conv.weight'] for stage in (1, 2, 3, 4)]
    arch = dict(
        num_blocks=list(blocks),
        width_factor=[len(value) / (32 * 2**i) for i, value in enumerate(first, 1)],
        group_layer_map=dict(_groups(weights)) or None,
        se_cfg=None,
        stem_channels=len(weights['backbone.stem.branch_3x3.conv.weight']),
    )
    kind = 'mmwsl.SmallImageRepVGG' if _is_small(weights, image_size) else 'RepVGG'
    return _classifier(dict(type=kind, arch=arch, out_indices=(3,)), weights)


def _groups(weights: Weights) -> Iterator[tuple[int, int]]:
    """Number, counted from 1, and groups of each grouped block of a RepVGG."""
    channels = len(weights['backbone.stem.branch_3x3.conv.weight'])
    kernels = [value for key, value in weights.items() if re.search(r'stage_.*branch_3x3\.conv', key)]
    for number, kernel in enumerate(kernels, start=1):
        if channels != kernel.shape[1]:
            yield number, channels // kernel.shape[1]
        channels = len(kernel)


def _fixed(kind: str, **kwargs: Any) -> Callable[[Weights, int | None], dict]:
    def network(weights: Weights, image_size: int | None) -> dict:
        return _classifier(dict(type=kind, **kwargs), weights)

    return network


_RENAMED = _by()
_OF_STAGE = r'layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|{}\.[01])'
# The first that fits is it, so a layout whose keys are among another's stands before it.
LAYOUTS = (
    Layout(
        'ResNet (RepDistiller, mdistiller, chenyaofo, torchvision)',
        rf'(conv1|bn1|{_OF_STAGE.format("downsample")}|fc)\.\w+',
        _RENAMED,
        _resnet,
        ('bn1.weight',),
    ),
    Layout(
        'ShuffleNetV1 (RepDistiller, mdistiller)',
        r'(conv1|bn1|layer[1-3]\.\d+\.(conv|bn)[1-3]|linear)\.\w+',
        _RENAMED,
        _fixed('mmwsl.CIFARShuffleNetV1'),
        ('layer3.3.conv3.weight',),
    ),
    Layout(
        'ShuffleNetV2 (RepDistiller, mdistiller)',
        r'((conv|bn)[12]|layer[1-3]\.\d+\.(conv|bn)[1-5]|linear)\.\w+',
        _by(
            (r'^layer(\d)\.(\d+)\.(conv|bn)(\d)', lambda key: _shufflenet_v2(*key.groups())),
            (r'^(conv|bn)1\.', lambda key: f'conv1.{("conv", "bn").index(key[1])}.'),
            (r'^(conv|bn)2\.', r'layers.3.\1.'),
        ),
        _fixed('mmwsl.CIFARShuffleNetV2'),
        ('conv2.weight',),
    ),
    Layout(
        'ResNet (kuangliu, akamaster; ResNet50 of RepDistiller, mdistiller)',
        rf'(conv1|bn1|{_OF_STAGE.format("shortcut")}|linear)\.\w+',
        _by((r'\.shortcut\.', '.downsample.')),
        _resnet,
        ('bn1.weight',),
    ),
    Layout(
        'ResNet (weiaicunzai)',
        r'(conv1\.[01]|conv[2-5]_x\.\d+\.(residual_function\.[013467]|shortcut\.[01])|fc)\.\w+',
        _by(
            (r'^conv1\.([01])\.', lambda key: f'{("conv", "bn")[int(key[1])]}1.'),
            (r'^conv(\d)_x\.', lambda key: f'layer{int(key[1]) - 1}.'),
            (r'\.shortcut\.', '.downsample.'),
            (r'\.residual_function\.(\d)', lambda key: f'.{("conv", "bn")[int(key[1]) % 3]}{int(key[1]) // 3 + 1}'),
        ),
        _resnet,
    ),
    Layout(
        'WideResNet (RepDistiller, mdistiller)',
        r'(conv1|bn1|block[1-3]\.layer\.\d+\.(conv[12]|bn[12]|convShortcut)|fc)\.\w+',
        _by((r'^block(\d)\.layer\.', r'layer\1.'), (r'\.convShortcut\.', '.downsample.')),
        _wide_resnet,
    ),
    Layout(
        'VGG-8 with BatchNorm (RepDistiller, mdistiller)',
        r'(block[0-4]\.[01]|classifier)\.\w+',
        _by((r'^block(\d)\.(\d)', lambda key: _stage_of_vgg(1, *key.groups()))),
        _fixed('mmwsl.CIFARVGG', depth=8),
    ),
    Layout(
        'VGG-13 with BatchNorm (RepDistiller, mdistiller)',
        r'(block[0-4]\.[0134]|classifier)\.\w+',
        _by((r'^block(\d)\.(\d)', lambda key: _stage_of_vgg(2, *key.groups()))),
        _fixed('mmwsl.CIFARVGG', depth=13),
    ),
    Layout(
        'VGG (chenyaofo, kuangliu, torchvision)',
        r'(features\.\d+|classifier(\.[0-6])?)\.\w+',
        _vgg,
        _vgg_network,
        ('features.0.bias',),
    ),
    Layout(
        'MobileNetV2 at half width (RepDistiller, mdistiller)',
        r'(conv[12]\.[01]|blocks\.\d\.\d\.conv\.[013467]|classifier\.0)\.\w+',
        _RENAMED,
        _fixed('mmwsl.CIFARMobileNetV2', widen_factor=0.5),
    ),
    Layout(
        'MobileNetV2 (chenyaofo, torchvision)',
        r'(features\.(0|18)\.[01]|features\.\d+\.conv\.(\d\.[01]|[123])|classifier\.1)\.\w+',
        _by(
            (r'^classifier\.1\.', 'head.fc.'),
            (r'^features\.0\.([01])\.', lambda key: f'conv1.{("conv", "bn")[int(key[1])]}.'),
            (r'^features\.18\.([01])\.', lambda key: f'conv2.{("conv", "bn")[int(key[1])]}.'),
            (r'^features\.(\d+)\.conv\.(\d\.[01]|\d)\.', lambda key: _block_of_mobilenet_v2(*key.groups())),
        ),
        _mobilenet_v2,
    ),
    Layout(
        'ShuffleNetV2 (chenyaofo, torchvision)',
        r'(conv[15]\.[01]|stage[2-4]\.\d+\.branch[12]\.\d|fc)\.\w+',
        _by(
            (r'^conv5\.', 'layers.3.'),
            (r'^stage(\d)\.', lambda key: f'layers.{int(key[1]) - 2}.'),
            (r'^(conv1|layers\.3)\.([01])\.(?!branch|\d)', lambda key: f'{key[1]}.{("conv", "bn")[int(key[2])]}.'),
            (r'\.branch([12])\.(\d)', lambda key: f'.branch{key[1]}.{_SHUFFLE_BRANCH[key[1]][int(key[2])]}'),
        ),
        _shufflenet_v2_network,
    ),
    Layout(
        'RepVGG (chenyaofo, DingXiaoH)',
        r'(stage0|stage[1-4]\.\d+)\.(rbr_dense\.(conv|bn)|rbr_1x1\.(conv|bn)|rbr_identity)\.\w+|linear\.\w+',
        _by(
            (r'^stage0\.', 'stem.'),
            (r'^stage(\d)\.', r'stage_\1.'),
            (r'\.(rbr_\w+(\.conv|\.bn)?)', lambda key: f'.{_REPVGG[key[1]]}'),
        ),
        _repvgg,
    ),
)
