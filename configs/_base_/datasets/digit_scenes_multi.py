data_preprocessor = dict(type='ClsDataPreprocessor', num_classes=10, mean=[60.0] * 3, std=[60.0] * 3, to_rgb=False)

train_dataloader = dict(
    batch_size=20,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews',
        dataset=dict(
            type='mmwsl.DigitScenes', task='multi', split='train', scenes=600, pipeline=[dict(type='PackInputs')]
        ),
    ),
)

val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmwsl.DigitScenes', task='multi', split='test', scenes=300, pipeline=[dict(type='PackInputs')]),
)
val_evaluator = [dict(type='AveragePrecision'), dict(type='MultiLabelMetric')]

test_dataloader = val_dataloader
test_evaluator = val_evaluator
