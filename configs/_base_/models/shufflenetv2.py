shufflenetv2 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='ShuffleNetV2'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=1024, topk=(1, 5)),
)
