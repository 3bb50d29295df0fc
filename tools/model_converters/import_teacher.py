"""Rename a published classifier's weights to mmpretrain's keys, ready to be a teacher.

Known: the CIFAR networks of HobbitLong/RepDistiller and megvii-research/mdistiller, the CIFAR ResNets of
chenyaofo/pytorch-cifar-models, and torchvision's ResNets. The layout is recognised by its keys, and named. With
--config, the result is loaded into that config's teacher (or its only model), strictly, before it is written.
"""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import re
from collections.abc import Callable

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmwsl.analysis.predict import network_config
from mmwsl.utils import load_weights, read_weights, save_weights
from mmwsl.utils.looks_like import looks_like
from mmwsl.utils.text import first_of

_CLASSIFIER = (r'^(fc|linear|classifier|classifier\.0)\.(?=weight|bias)', 'head.fc.')
_BACKBONE = (r'^(?!head\.)', 'backbone.')

Replacement = str | Callable[[re.Match], str]
# name: what every key must match, and how keys are renamed, in this order. The first that fits is it, so a layout whose
# keys are among another's stands before it.
LAYOUTS: dict[str, tuple[str, tuple[tuple[str, Replacement], ...]]] = {
    'ResNet (RepDistiller, mdistiller, chenyaofo, torchvision)': (
        r'(conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01])|fc)\.\w+',
        (_CLASSIFIER, _BACKBONE)),
    'ShuffleNetV1 (RepDistiller, mdistiller)': (
        r'(conv1|bn1|layer[1-3]\.\d+\.(conv|bn)[1-3]|linear)\.\w+',
        (_CLASSIFIER, _BACKBONE)),
    'ShuffleNetV2 (RepDistiller, mdistiller)': (
        r'((conv|bn)[12]|layer[1-3]\.\d+\.(conv|bn)[1-5]|linear)\.\w+',
        ((r'^layer(\d)\.(\d+)\.(conv|bn)(\d)', lambda key: _shufflenet_v2(*key.groups())),
         (r'^(conv|bn)1\.', lambda key: f'conv1.{("conv", "bn").index(key[1])}.'), (r'^(conv|bn)2\.', r'layers.3.\1.'),
         _CLASSIFIER, _BACKBONE)),
    'ResNet50 (RepDistiller, mdistiller)': (
        r'(conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|shortcut\.[01])|linear)\.\w+',
        ((r'\.shortcut\.', '.downsample.'), _CLASSIFIER, _BACKBONE)),
    'WideResNet (RepDistiller, mdistiller)': (
        r'(conv1|bn1|block[1-3]\.layer\.\d+\.(conv[12]|bn[12]|convShortcut)|fc)\.\w+',
        ((r'^block(\d)\.layer\.', r'layer\1.'), (r'\.convShortcut\.', '.downsample.'), _CLASSIFIER, _BACKBONE)),
    'VGG-8 with BatchNorm (RepDistiller, mdistiller)': (
        r'(block[0-4]\.[01]|classifier)\.\w+',
        ((r'^block(\d)\.(\d)', lambda key: _vgg(*key.groups(), convolutions=1)), _CLASSIFIER, _BACKBONE)),
    'VGG-13 with BatchNorm (RepDistiller, mdistiller)': (
        r'(block[0-4]\.[0134]|classifier)\.\w+',
        ((r'^block(\d)\.(\d)', lambda key: _vgg(*key.groups(), convolutions=2)), _CLASSIFIER, _BACKBONE)),
    'MobileNetV2 at half width (RepDistiller, mdistiller)': (
        r'(conv[12]\.[01]|blocks\.\d\.\d\.conv\.[013467]|classifier\.0)\.\w+',
        (_CLASSIFIER, _BACKBONE)),
}


def _vgg(stage: str, layer: str, convolutions: int) -> str:
    """mmpretrain counts convolutions and pools throughout; a published stage counts its own layers, three at a time."""
    index, kind = divmod(int(layer), 3)
    return f'features.{int(stage) * (convolutions + 1) + index}.{("conv", "bn")[kind]}'


def _shufflenet_v2(stage: str, block: str, kind: str, number: str) -> str:
    """The first block of a stage numbers its two branches through; the others have one branch."""
    halves, place = block == '0', int(number) - 1
    branch, layer = (1, place) if halves and place < 2 else (2, place - 2 * halves)
    return f'layers.{int(stage) - 1}.{block}.branch{branch}.{layer}.{kind}'


def convert(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights under mmpretrain's keys, and the name of the layout that was found.

    Raises:
        ValueError: If the keys fit none of the known layouts, or are mmpretrain's; nothing is converted by halves.
    """
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if any(key.startswith('backbone.') for key in weights):
        raise ValueError(f"the keys are mmpretrain's already, of {looks_like(weights)}: there is nothing to convert. "
                         'Name the file in model.teacher_ckpt of a config with this network')
    strangers: dict[str, list[str]] = {}
    for name, (pattern, renames) in LAYOUTS.items():
        strangers[name] = [key for key in weights if not re.fullmatch(pattern, key)]
        if not strangers[name]:
            return {_renamed(key, renames): value for key, value in weights.items()}, name
    nearest = min(strangers, key=lambda name: len(strangers[name]))
    raise ValueError(f'unknown layout of {len(weights)} keys, which look like {looks_like(weights)}. Known: '
                     f'{"; ".join(LAYOUTS)}. The nearest is {nearest}, but it has no {first_of(strangers[nearest])}. '
                     'mmpretrain has converters for other networks, in its tools/model_converters')


def _renamed(key: str, renames: tuple[tuple[str, Replacement], ...]) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def network_of(config: str) -> nn.Module:
    """A config's teacher, or its only model."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    return MODELS.build(network_config(cfg, 'teacher'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='the published file')
    parser.add_argument('target', help='the file to write, e.g. checkpoints/resnet56_cifar100.pth')
    parser.add_argument('--config', help='a config whose teacher, or only model, the result must fit')
    args = parser.parse_args()
    weights, layout = convert(read_weights(args.source, 'Give the path of the published file'))
    if args.config:
        advice = f'It is a {layout}: choose a config whose teacher is as deep and wide, with as many classes'
        load_weights(network_of(args.config), weights, args.source, advice)
    save_weights(weights, args.target)
    print(f'{layout}: {len(weights)} tensors written to {args.target}')


if __name__ == '__main__':
    main()
