resnet32x4 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=32, stem_channels=32, base_channels=64),
    neck=dict(type='GlobalAveragePooling'),
    # drawn as nn.Linear does by itself, as in the field's code
    head=dict(type='LinearClsHead', num_classes=100, in_channels=256, init_cfg=None),
)
