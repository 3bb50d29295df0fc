digits_teacher = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=14, in_channels=1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
)
digits_student = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=8, in_channels=1, stem_channels=2, base_channels=2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
)
