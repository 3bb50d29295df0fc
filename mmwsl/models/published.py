"""Import published networks: recognise them by their keys, rename the keys to mmpretrain's, and build the network."""

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

_SMALL = {10: True, 100: True, 1000: False}  # whether images are small, by number of classes: CIFAR and ImageNet
_VGG_FEATURES = 512  # at 32 x 32; 49 times as many at 224 x 224
_WIDTHS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4, 2.0)  # width factors of published MobileNetV2


class Layout(NamedTuple):
    """One way of naming and nesting a network's weights.

    Attributes:
        name: Kind of network, and who publishes it.
        keys: Pattern that every key matches.
        rename: Function from a state dict with these keys to one with mmpretrain's.
        network: Function from a renamed state dict and the size of its images (None if unknown) to a classifier's
            config.
        needs: Keys that distinguish it from other networks whose keys match as well.
    """

    name: str
    keys: str
    rename: Callable[[Weights], dict[str, Tensor]]
    network: Callable[[Weights, int | None], dict]
    needs: tuple[str, ...] = ()

    def strangers(self, weights: Weights) -> list[str]:
        """Return the keys that do not belong to this layout, and those that it needs but are missing."""
        missing = [key for key in self.needs if key not in weights]
        return [key for key in weights if not re.fullmatch(self.keys, key)] + missing


def convert(weights: Weights) -> tuple[dict[str, Tensor], Layout]:
    """Return weights with mmpretrain's keys, and the layout that was recognised.

    Args:
        weights: A published state dict. A prefix ``module.`` is removed.

    Raises:
        ValueError: If not all keys fit one of the known layouts, or they are mmpretrain's already.
    """
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if any(key.startswith('backbone.') for key in weights):
        raise ValueError(
            f"there is nothing to convert: the keys, of {looks_like(weights)}, are already mmpretrain's. "
            'Set model.teacher_ckpt to this file in a config with this network'
        )
    strangers = {layout.name: layout.strangers(weights) for layout in LAYOUTS}
    for layout in LAYOUTS:
        if not strangers[layout.name]:
            with _explained(weights, layout):
                return layout.rename(weights), layout
    nearest = min(strangers, key=lambda name: len(strangers[name]))
    raise ValueError(
        f'unknown layout of {len(weights)} keys, which look like {looks_like(weights)}. The nearest is '
        f'{nearest}, except for {first_of(strangers[nearest])}. docs/teachers.md lists the known layouts, and '
        'what to do with other networks'
    )


def network_of(weights: Weights, layout: Layout, image_size: int | None, source: str) -> tuple[dict, nn.Module]:
    """Build the network that converted weights belong to, in eval mode, and load the weights strictly.

    Args:
        weights: Weights with mmpretrain's keys.
        layout: Layout that :func:`convert` returned.
        image_size: Side of its images in pixels, 32 or 224. None: inferred from the number of classes, if this is
            CIFAR's or ImageNet's.
        source: Origin of the weights, for messages.

    Returns:
        The classifier's config, and the classifier.

    Raises:
        ValueError: If no network here has its blocks and channels, or its image size cannot be inferred.
    """
    with _explained(weights, layout):
        config = layout.network(weights, image_size)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        network = MODELS.build(dict(config))
    load_weights(
        network, dict(weights), source, f'Its keys are those of {layout.name}: give a config that fits with --config'
    )
    network.eval()
    return config, network


@contextmanager
def _explained(weights: Weights, layout: Layout) -> Iterator[None]:
    """Explain errors for a network with a known layout but other blocks or channels."""
    try:
        yield
    except (KeyError, IndexError) as error:
        raise ValueError(
            f'it looks like {looks_like(weights)}, laid out as {layout.name}, but no network here has its '
            'blocks and channels. Give a config that has them with --config'
        ) from error


# ------------------------------------------------------------------------------------------------------------ renaming

_CLASSIFIER = (r'^(fc|linear|classifier|classifier\.0)\.(?=weight|bias)', 'head.fc.')
_BACKBONE = (r'^(?!head\.|backbone\.)', 'backbone.')


def _by(*renames: tuple[str, Replacement]) -> Callable[[Weights], dict[str, Tensor]]:
    """Return a function that renames each key: by these patterns in order, then for classifier and backbone."""

    def rename(weights: Weights) -> dict[str, Tensor]:
        found = {}
        for key, value in weights.items():
            for pattern, replacement in (*renames, _CLASSIFIER, _BACKBONE):
                key = re.sub(pattern, replacement, key)
            found[key] = value
        return found

    return rename


def _stage_of_vgg(convolutions: int, stage: str, layer: str) -> str:
    """Key of a layer in mmpretrain, which numbers convolutions and pools of all stages; a published stage numbers its
    own layers, three per convolution."""
    index, kind = divmod(int(layer), 3)
    return f'features.{int(stage) * (convolutions + 1) + index}.{("conv", "bn")[kind]}'


def _vgg(weights: Weights) -> dict[str, Tensor]:
    """Rename the layers of VGG's Sequential, which also numbers norms and activations; mmpretrain's does not."""
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
    """Key of a layer in mmpretrain; the first block of a stage numbers its two branches consecutively, the others have
    one branch."""
    halves, place = block == '0', int(number) - 1
    branch, layer = (1, place) if halves and place < 2 else (2, place - 2 * halves)
    return f'layers.{int(stage) - 1}.{block}.branch{branch}.{layer}.{kind}'


# mmpretrain's names for the layers of a Sequential, in which activations are numbered too.
_SHUFFLE_BRANCH = {
    '1': ['0.conv', '0.bn', '1.conv', '1.bn'],
    '2': ['0.conv', '0.bn', '', '1.conv', '1.bn', '2.conv', '2.bn'],
}
_FIRST_BLOCK = {'0.0': '0.conv', '0.1': '0.bn', '1': '1.conv', '2': '1.bn'}  # of MobileNetV2, without expansion
_BLOCK = {'0.0': '0.conv', '0.1': '0.bn', '1.0': '1.conv', '1.1': '1.bn', '2': '2.conv', '3': '2.bn'}


def _block_of_mobilenet_v2(block: str, layer: str) -> str:
    """Key of a layer in mmpretrain, which numbers blocks by stage; published networks number them consecutively."""
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
    """Whether a network has the strides for CIFAR's images, which its weights do not tell."""
    classes = len(weights[_last_linear(weights)])
    if image_size is None and classes not in _SMALL:
        raise ValueError(
            f'the weights of a network with {classes} classes do not tell whether it is for small or for large '
            'images, which differ in the strides: give --image-size 32 or 224'
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
    """Depth of a network with three equal stages of two-layer blocks, and some other layers."""
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
    """Channels of a ResNet's input, stem and first stage, if they differ from the usual ones."""
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
    """Index, counted from 1, and number of groups of each grouped block of a RepVGG."""
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
# The first layout that fits is used, so one whose keys are a subset of another's comes before it.
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
