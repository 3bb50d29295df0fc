data_preprocessor = dict(type='mmdet.DetDataPreprocessor', mean=[60.0] * 3, std=[60.0] * 3, pad_size_divisor=8)

pipeline = [
    dict(type='mmdet.LoadAnnotations', with_bbox=True),
    dict(
        type='mmdet.PackDetInputs',  # the metric needs 'instances', which a file of annotations has elsewhere
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
train_dataloader = dict(
    batch_size=10,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews',
        dataset=dict(type='mmwsl.DigitScenes', task='det', split='train', scenes=600, pipeline=pipeline),
    ),
)

val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmwsl.DigitScenes', task='det', split='test', scenes=300, pipeline=pipeline),
)
val_evaluator = dict(type='mmdet.CocoMetric', metric='bbox')

test_dataloader = val_dataloader
test_evaluator = val_evaluator
