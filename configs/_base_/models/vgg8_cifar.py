vgg8 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARVGG', depth=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=512),
)
