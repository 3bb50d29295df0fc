# GFL, from scratch, with a quarter of ResNet's width and of the head's: which one thread trains in some twenty minutes.
_head = dict(
    type='GFLHead',
    num_classes=3,
    in_channels=64,
    feat_channels=64,
    stacked_convs=2,
    reg_max=16,
    norm_cfg=dict(type='BN'),
    anchor_generator=dict(
        type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16, 32]
    ),
    loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
    loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
    loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
)
_rest = dict(
    type='GFL',
    _scope_='mmdet',
    bbox_head=_head,
    train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100
    ),
)
_scratch = dict(type='ResNet', base_channels=16, out_indices=(1, 2, 3), norm_eval=False)

bccd_teacher = dict(
    _rest,
    backbone=dict(_scratch, depth=50),
    neck=dict(type='FPN', in_channels=[128, 256, 512], out_channels=64, num_outs=3),
)
bccd_student = dict(
    _rest,
    backbone=dict(_scratch, depth=18),
    neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=64, num_outs=3),
)
del _head, _rest, _scratch
