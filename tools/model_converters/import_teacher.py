"""Rename a published classifier's weights to mmpretrain's keys, ready to be a teacher, and print its config.

Known by their layout: the CIFAR networks of RepDistiller, mdistiller, chenyaofo/pytorch-cifar-models,
kuangliu/pytorch-cifar, weiaicunzai/pytorch-cifar100 and akamaster/pytorch_resnet_cifar10, torchvision's ResNet, VGG,
MobileNetV2 and ShuffleNetV2, and any network of timm's with a --config that names it; docs/teachers.md has the list.
Before they are written, weights are loaded strictly into the teacher (or only model) of --config, or else into a
network of the shapes that they have.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmwsl.analysis.predict import network_config
from mmwsl.models.published import convert
from mmwsl.models.published import network_of as published_network
from mmwsl.utils import load_weights, read_weights, save_weights
from mmwsl.utils.looks_like import looks_like


def network_of(config: str) -> nn.Module:
    """Build a config's teacher, or its only model."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    return MODELS.build(network_config(cfg, 'teacher'))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='the published file')
    parser.add_argument('target', help='the file to write, e.g. checkpoints/resnet56_cifar100.pth')
    parser.add_argument('--config', help='a config whose teacher, or only model, the result must fit')
    parser.add_argument(
        '--image-size',
        type=int,
        choices=(32, 224),
        help='size of its images in pixels, if the '
        'weights do not tell; default: 32 with 10 or 100 classes, 224 with 1000',
    )
    args = parser.parse_args(arguments)
    weights, advice = read_weights(args.source, 'Give the path of the published file'), ''
    network = network_of(args.config) if args.config else None
    if type(network).__name__ == 'TimmClassifier':
        converted, name = weights, "timm's own"
    else:
        converted, layout = convert(weights)
        name = layout.name
    if network is not None:
        load_weights(
            network,
            converted,
            args.source,
            f'Its layout is {name}: choose a config whose teacher is as deep and wide, with as many classes',
        )
    else:
        config, network = published_network(converted, layout, args.image_size, args.source)
        advice = f'\n{Config(dict(teacher=config)).pretty_text}\nteacher_ckpt = {args.target!r}\n'
    save_weights(converted, args.target)
    print(f'{name}: {looks_like(converted)}; {len(converted)} tensors written to {args.target}{advice}')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
