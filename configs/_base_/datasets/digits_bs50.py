data_preprocessor = dict(type='ClsDataPreprocessor', num_classes=10, mean=[4.9], std=[6.0], to_rgb=False)

train_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,  # mmpretrain's own tools assume True, which torch refuses without workers
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews', dataset=dict(type='mmwsl.Digits', split='train', pipeline=[dict(type='PackInputs')])
    ),
)

val_dataloader = dict(
    batch_size=400,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmwsl.Digits', split='test', pipeline=[dict(type='PackInputs')]),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
