# GFL on features with a quarter, an eighth and a sixteenth of the image's side, with anchors of 16, 32 and 64 pixels.
_head = dict(
    type='GFLHead',
    num_classes=10,
    stacked_convs=1,
    reg_max=8,
    norm_cfg=dict(type='BN'),
    anchor_generator=dict(
        type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[4, 8, 16]
    ),
    loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
    loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
    loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
)
_training = dict(
    train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=20
    ),
)

digits_det_teacher = dict(
    type='GFL',
    _scope_='mmdet',
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    ),
    neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=32, num_outs=3),
    bbox_head=dict(_head, in_channels=32, feat_channels=32),
    **_training,
)
digits_det_student = dict(
    type='GFL',
    _scope_='mmdet',
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    ),
    neck=dict(type='FPN', in_channels=[8, 16, 32], out_channels=8, num_outs=3),
    bbox_head=dict(_head, in_channels=8, feat_channels=8),
    **_training,
)
del _head, _training
