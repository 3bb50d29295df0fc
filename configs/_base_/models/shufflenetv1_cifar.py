shufflenetv1 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARShuffleNetV1'),
    neck=dict(type='GlobalAveragePooling'),
    # initialised as by nn.Linear, as in the code that papers compare with
    head=dict(type='LinearClsHead', num_classes=100, in_channels=960, init_cfg=None),
)
