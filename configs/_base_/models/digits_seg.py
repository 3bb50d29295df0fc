# A ResNet whose features have a quarter of the image's side, and one convolution before the classes.
digits_seg_teacher = dict(
    type='EncoderDecoder',
    _scope_='mmseg',
    backbone=dict(type='mmwsl.CIFARResNet', depth=14),
    decode_head=dict(
        type='FCNHead', in_channels=64, in_index=0, channels=32, num_convs=1, concat_input=False, dropout_ratio=0,
        num_classes=11, norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
digits_seg_student = dict(
    type='EncoderDecoder',
    _scope_='mmseg',
    backbone=dict(type='mmwsl.CIFARResNet', depth=14, stem_channels=8, base_channels=8),
    decode_head=dict(
        type='FCNHead', in_channels=32, in_index=0, channels=16, num_convs=1, concat_input=False, dropout_ratio=0,
        num_classes=11, norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
