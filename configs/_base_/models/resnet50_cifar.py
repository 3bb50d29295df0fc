resnet50 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='ResNet_CIFAR', depth=50, zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    # initialised as by nn.Linear, as in the code that papers compare with
    head=dict(type='LinearClsHead', num_classes=100, in_channels=2048, init_cfg=None),
)
