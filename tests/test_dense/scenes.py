"""Small segmentors on small scenes."""

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS

from mmwsl.datasets import DigitScenes

PREPROCESSOR = dict(type='mmseg.SegDataPreProcessor', mean=[60] * 3, std=[60] * 3, size=(40, 40), seg_pad_val=255)


def head(base=2, **kwargs):
    return {
        **dict(
            type='FCNHead',
            in_channels=4 * base,
            in_index=0,
            channels=4,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0,
            num_classes=11,
            align_corners=False,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
        **kwargs,
    }


def segmentor(base=2, decode_head=None, **kwargs):
    return {
        **dict(
            type='mmseg.EncoderDecoder',
            _scope_='mmseg',
            backbone=dict(type='mmwsl.CIFARResNet', depth=8, stem_channels=base, base_channels=base),
            decode_head=decode_head or head(base),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        ),
        **kwargs,
    }


def distillation(student=None, teacher=None, seed=1, **kwargs):
    """A built WSLDistill between two segmentors, whose weights are drawn from a seed."""
    loss = dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=2.0, loss_weight=1.5))
    config = {
        **dict(
            type='mmwsl.WSLDistill',
            architecture=student or segmentor(),
            teacher=teacher or segmentor(4),
            data_preprocessor=PREPROCESSOR,
            distiller=dict(type='mmwsl.WSLDistiller', distill_losses=loss),
        ),
        **kwargs,
    }
    torch.manual_seed(seed)
    model = MODELS.build(config)
    for network in (model.student, model.teacher):  # those of a teacher are steeper than those that init draws
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.3)
    return model


def batch(images=3, size=40):
    scenes = DigitScenes(scenes=images, size=size, digits=(1, 2), pipeline=[dict(type='mmseg.PackSegInputs')])
    return pseudo_collate([scenes[i] for i in range(images)])


def losses(model, data):
    model.train()
    return model(**model.data_preprocessor(data, True), mode='loss')
