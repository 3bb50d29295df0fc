resnet44 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=44),
    neck=dict(type='GlobalAveragePooling'),
    # initialised as by nn.Linear, as in the code that papers compare with
    head=dict(type='LinearClsHead', num_classes=100, in_channels=64, init_cfg=None),
)
