resnet56 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=56),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=64))
