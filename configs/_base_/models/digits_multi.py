multi_teacher = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=14),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=64),
)
multi_student = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='mmwsl.CIFARResNet', depth=8, stem_channels=8, base_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=32),
)
