resnet8 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=8),
    neck=dict(type='GlobalAveragePooling'),
    # drawn as nn.Linear does by itself, as in the field's code
    head=dict(type='LinearClsHead', num_classes=100, in_channels=64, init_cfg=None),
)
