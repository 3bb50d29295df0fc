"""Small detectors on small scenes."""

import copy

import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS

from mmwsl.datasets import DigitScenes

PREPROCESSOR = dict(type='mmdet.DetDataPreprocessor', mean=[60] * 3, std=[60] * 3, pad_size_divisor=8)
KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape')
PIPELINE = [dict(type='mmdet.LoadAnnotations', with_bbox=True), dict(type='mmdet.PackDetInputs', meta_keys=KEYS)]
STRIDES = [4, 8]

_ATSS = dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False)
_IOU = dict(
    assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
    sampler=dict(type='PseudoSampler'),
    allowed_border=-1,
    pos_weight=-1,
    debug=False,
)
_DYNAMIC = dict(assigner=dict(type='DynamicSoftLabelAssigner', topk=5), allowed_border=-1, pos_weight=-1, debug=False)
_LEVEL = dict(
    assigner=dict(type='UniformAssigner', pos_ignore_thr=0.15, neg_ignore_thr=0.7),
    allowed_border=-1,
    pos_weight=-1,
    debug=False,
)
_ONE = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES)
_SEVERAL = dict(type='AnchorGenerator', ratios=[0.5, 1.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES)
_FOCAL = dict(type='FocalLoss', use_sigmoid=True)
_CODER = dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])

_QUALITY = dict(type='QualityFocalLoss', use_sigmoid=True)
_POINTS = dict(type='MlvlPointGenerator', offset=0, strides=STRIDES)
_BN, _GIOU = dict(norm_cfg=dict(type='BN')), dict(loss_bbox=dict(type='GIoULoss'))

DETECTORS = {  # by the head: the detector's type, what is particular to the head, and how it is trained
    'GFLHead': ('GFL', dict(anchor_generator=_ONE, reg_max=4, loss_cls=_QUALITY, **_BN, **_GIOU), _ATSS),
    'ATSSHead': (
        'ATSS',
        dict(anchor_generator=_ONE, bbox_coder=_CODER, reg_decoded_bbox=True, loss_cls=_FOCAL, **_BN, **_GIOU),
        _ATSS,
    ),
    'RetinaHead': ('RetinaNet', dict(anchor_generator=_SEVERAL, bbox_coder=_CODER, loss_cls=_FOCAL), _IOU),
    'RetinaSepBNHead': (
        'RetinaNet',
        dict(anchor_generator=_SEVERAL, bbox_coder=_CODER, num_ins=2, loss_cls=_FOCAL),
        _IOU,
    ),
    'FCOSHead': ('FCOS', dict(strides=STRIDES, regress_ranges=((-1, 24), (24, 1e8)), loss_cls=_FOCAL, **_BN), None),
    'RTMDetHead': (
        'RTMDet',
        dict(
            anchor_generator=_POINTS,
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            with_objectness=False,
            loss_cls=_QUALITY,
            **_BN,
            **_GIOU,
        ),
        _DYNAMIC,
    ),
    'RTMDetSepBNHead': (
        'RTMDet',
        dict(
            anchor_generator=_POINTS,
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            with_objectness=False,
            loss_cls=_QUALITY,
            **_BN,
            **_GIOU,
        ),
        _DYNAMIC,
    ),
    'YOLOFHead': (
        'YOLOF',
        dict(
            anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[2, 4], strides=[8]),
            num_cls_convs=1,
            num_reg_convs=1,
            reg_decoded_bbox=True,
            bbox_coder=dict(_CODER, add_ctr_clamp=True),
            loss_cls=_FOCAL,
            **_BN,
            **_GIOU,
        ),
        _LEVEL,
    ),
}


def detector(name='GFLHead', base=2, classes=10, **kwargs):
    """A config of features with strides 4 and 8 (YOLOF: 8), and a head of one layer before the scores."""
    kind, head, train_cfg = copy.deepcopy(DETECTORS[name])
    depth = {} if name == 'YOLOFHead' else dict(feat_channels=4 * base, stacked_convs=1)
    return dict(
        type=kind,
        _scope_='mmdet',
        backbone=dict(type='mmwsl.CIFARResNet', depth=8, stem_channels=base, base_channels=base),
        neck=dict(
            type='ChannelMapper',
            in_channels=[4 * base],
            out_channels=4 * base,
            num_outs=1 if name == 'YOLOFHead' else 2,
            norm_cfg=dict(type='BN'),
        ),
        bbox_head={**dict(type=name, num_classes=classes, in_channels=4 * base), **depth, **head, **kwargs},
        train_cfg=train_cfg,
        test_cfg=dict(
            nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=20
        ),
    )


def two_stages(base=2):
    """A config of Faster R-CNN on the same features."""
    iou = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3, ignore_iof_thr=-1)
    sampler = dict(type='RandomSampler', num=32, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True)
    proposals = dict(nms_pre=100, max_per_img=50, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
    extractor = dict(
        type='SingleRoIExtractor',
        out_channels=4 * base,
        featmap_strides=STRIDES,
        roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=1, use_torchvision=True),
    )
    box_head = dict(
        type='Shared2FCBBoxHead',
        in_channels=4 * base,
        fc_out_channels=8,
        roi_feat_size=3,
        num_classes=10,
        bbox_coder=_CODER,
    )
    rpn = dict(
        assigner=iou, sampler=dict(sampler, add_gt_as_proposals=False), allowed_border=-1, pos_weight=-1, debug=False
    )
    return ConfigDict(
        {key: detector(base=base)[key] for key in ('backbone', 'neck')},
        type='FasterRCNN',
        _scope_='mmdet',
        rpn_head=dict(
            type='RPNHead', in_channels=4 * base, feat_channels=4 * base, anchor_generator=_SEVERAL, bbox_coder=_CODER
        ),
        roi_head=dict(type='StandardRoIHead', bbox_roi_extractor=extractor, bbox_head=box_head),
        train_cfg=dict(
            rpn=rpn, rpn_proposal=proposals, rcnn=dict(assigner=iou, sampler=sampler, pos_weight=-1, debug=False)
        ),
        test_cfg=dict(
            rpn=proposals, rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20)
        ),
    )


def distillation(student=None, teacher=None, seed=1, steep=0.15, **kwargs):
    """A built WSLDistill between two detectors, whose weights are drawn from a seed."""
    config = {
        **dict(
            type='mmwsl.WSLDistill',
            architecture=student or detector(),
            teacher=teacher or detector(base=4),
            data_preprocessor=PREPROCESSOR,
            distiller=dict(type='mmwsl.WSLDistiller'),
        ),
        **kwargs,
    }
    torch.manual_seed(seed)
    model = MODELS.build(config)
    for network in (model.student, model.teacher):
        for parameter in network.parameters():
            parameter.data.normal_(0, steep)
    return model


def batch(images=2, first=0):
    scenes = DigitScenes(task='det', scenes=first + images, size=64, pipeline=PIPELINE)
    return pseudo_collate([scenes[first + i] for i in range(images)])


def losses(model, data):
    model.train()
    return model(**model.data_preprocessor(data, True), mode='loss')
