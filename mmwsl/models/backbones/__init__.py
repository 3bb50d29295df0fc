from mmwsl.models.backbones.cifar_resnet import CIFARResNet

__all__ = ['CIFARResNet']
