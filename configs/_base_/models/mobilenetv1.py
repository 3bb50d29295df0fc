mobilenetv1 = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    # timm's, with the paper's activation
    backbone=dict(type='TIMMBackbone', model_name='mobilenetv1_100', act_layer='relu'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=1024, topk=(1, 5)),
)
