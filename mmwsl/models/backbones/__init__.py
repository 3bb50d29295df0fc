"""Networks for small images that neither mmpretrain nor timm has."""

from mmwsl.models.backbones.cifar_mobilenet_v2 import CIFARMobileNetV2
from mmwsl.models.backbones.cifar_resnet import CIFARResNet
from mmwsl.models.backbones.cifar_shufflenet import CIFARShuffleNetV1, CIFARShuffleNetV2
from mmwsl.models.backbones.cifar_vgg import CIFARVGG
from mmwsl.models.backbones.small_images import SmallImageMobileNetV2, SmallImageRepVGG, SmallImageShuffleNetV2

__all__ = [
    'CIFARVGG',
    'CIFARMobileNetV2',
    'CIFARResNet',
    'CIFARShuffleNetV1',
    'CIFARShuffleNetV2',
    'SmallImageMobileNetV2',
    'SmallImageRepVGG',
    'SmallImageShuffleNetV2',
]
