shufflenetv1 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARShuffleNetV1'),
    neck=dict(type='GlobalAveragePooling'),
    # drawn as nn.Linear does by itself, as in the field's code
    head=dict(type='LinearClsHead', num_classes=100, in_channels=960, init_cfg=None),
)
