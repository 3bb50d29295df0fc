swin_tiny = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='SwinTransformer', arch='tiny', img_size=224),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=768, topk=(1, 5)),
)
