"""Rename a published classifier's weights to mmpretrain's keys, ready to be a teacher.

Known: the CIFAR ResNets of RepDistiller (github.com/HobbitLong/RepDistiller), mdistiller (github.com/megvii-research/
mdistiller) and chenyaofo/pytorch-cifar-models, and torchvision's ResNets. With --config, the result is loaded into that
config's teacher (or its only model), strictly, before it is written.
"""
import mmwsl  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import re

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmwsl.utils import load_weights, read_weights, save_weights

# name: what every key must match, and how keys are renamed, in this order
LAYOUTS = {
    'ResNet (RepDistiller, mdistiller, chenyaofo, torchvision)': (
        r'(conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01])|fc)\.\w+',
        ((r'^fc\.', 'head.fc.'), (r'^(?!head\.)', 'backbone.'))),
}


def convert(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights under mmpretrain's keys, and the name of the layout that was found.

    Raises:
        ValueError: If the keys fit none of the known layouts; nothing is converted by halves.
    """
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    strangers: dict[str, list[str]] = {}
    for name, (pattern, renames) in LAYOUTS.items():
        strangers[name] = [key for key in weights if not re.fullmatch(pattern, key)]
        if not strangers[name]:
            return {_renamed(key, renames): value for key, value in weights.items()}, name
    nearest = min(strangers, key=lambda name: len(strangers[name]))
    raise ValueError(f'unknown layout of {len(weights)} keys. Known: {"; ".join(LAYOUTS)}. The nearest is '
                     f'{nearest}, but it has no {", ".join(strangers[nearest][:8])}')


def _renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def network_of(config: str) -> nn.Module:
    """A config's teacher, or its only model."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    return MODELS.build(cfg.model.get('teacher', cfg.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='the published file')
    parser.add_argument('target', help='the file to write, e.g. checkpoints/resnet56_cifar100.pth')
    parser.add_argument('--config', help='a config whose teacher, or only model, the result must fit')
    args = parser.parse_args()
    weights, layout = convert(read_weights(args.source))
    if args.config:
        load_weights(network_of(args.config), weights, args.source)
    save_weights(weights, args.target)
    print(f'{layout}: {len(weights)} tensors written to {args.target}')


if __name__ == '__main__':
    main()
