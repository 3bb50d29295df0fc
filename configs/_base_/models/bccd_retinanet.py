# RetinaNet of the size of bccd.py's GFL, with six anchors a place: platelets, red and white cells are some 20, 50 and
# 100 pixels wide at half the images' size.
_head = dict(
    type='RetinaHead',
    num_classes=3,
    in_channels=64,
    feat_channels=64,
    stacked_convs=2,
    norm_cfg=dict(type='BN'),
    anchor_generator=dict(
        type='AnchorGenerator', ratios=[0.5, 1.0, 2.0], octave_base_scale=3, scales_per_octave=2, strides=[8, 16, 32]
    ),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4),
    loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
    loss_bbox=dict(type='L1Loss', loss_weight=1.0),
)
_rest = dict(
    type='RetinaNet',
    _scope_='mmdet',
    bbox_head=_head,
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
    ),
)
_scratch = dict(type='ResNet', base_channels=16, out_indices=(1, 2, 3), norm_eval=False)

bccd_retinanet_teacher = dict(
    _rest,
    backbone=dict(_scratch, depth=50),
    neck=dict(type='FPN', in_channels=[128, 256, 512], out_channels=64, num_outs=3),
)
bccd_retinanet_student = dict(
    _rest,
    backbone=dict(_scratch, depth=18),
    neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=64, num_outs=3),
)
del _head, _rest, _scratch
