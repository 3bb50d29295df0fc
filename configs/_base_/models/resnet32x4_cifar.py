resnet32x4 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=32, stem_channels=32, base_channels=64),
    neck=dict(type='GlobalAveragePooling'),
    # initialised as by nn.Linear, as in the code that papers compare with
    head=dict(type='LinearClsHead', num_classes=100, in_channels=256, init_cfg=None),
)
