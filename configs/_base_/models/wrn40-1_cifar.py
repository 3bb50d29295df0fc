wrn40_1 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmrazor.WideResNet', depth=40, widen_factor=1),
    neck=dict(type='GlobalAveragePooling'),
    # initialised as by nn.Linear, but with a bias of zero, as in the code that papers compare with
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        in_channels=64,
        init_cfg=dict(
            type='Kaiming', layer='Linear', a=5**0.5, mode='fan_in', nonlinearity='leaky_relu', distribution='uniform'
        ),
    ),
)
