data_preprocessor = dict(
    type='mmseg.SegDataPreProcessor', mean=[60.0] * 3, std=[60.0] * 3, size=(64, 64), seg_pad_val=255
)

train_dataloader = dict(
    batch_size=10,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews',
        dataset=dict(
            type='mmwsl.DigitScenes', task='seg', split='train', scenes=600, pipeline=[dict(type='mmseg.PackSegInputs')]
        ),
    ),
)

val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmwsl.DigitScenes', task='seg', split='test', scenes=300, pipeline=[dict(type='mmseg.PackSegInputs')]
    ),
)
val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])

test_dataloader = val_dataloader
test_evaluator = val_evaluator
