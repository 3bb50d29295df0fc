# BCCD: 364 images of blood under a microscope, 640 x 480, read at half that size, with boxes of three kinds of cells,
# in VOC's layout (MIT, github.com/Shenggan/BCCD_Dataset).
data_preprocessor = dict(
    type='mmdet.DetDataPreprocessor', mean=[180.0] * 3, std=[50.0] * 3, bgr_to_rgb=True, pad_size_divisor=32
)

_cells = dict(
    type='mmdet.XMLDataset',
    data_root='data/bccd/',
    data_prefix=dict(sub_data_root=''),
    metainfo=dict(classes=('RBC', 'WBC', 'Platelets')),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews',
        dataset=dict(
            _cells,
            ann_file='ImageSets/Main/train.txt',
            filter_cfg=dict(bbox_min_size=2),  # two boxes are empty
            pipeline=[
                dict(type='mmdet.LoadImageFromFile'),
                dict(type='mmdet.LoadAnnotations', with_bbox=True),
                dict(
                    type='RandomResize',
                    resize_type='mmdet.Resize',
                    scale=(320, 240),
                    ratio_range=(0.8, 1.25),
                    keep_ratio=True,
                ),
                dict(type='mmdet.RandomCrop', crop_size=(240, 320)),
                dict(type='mmdet.RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
                dict(type='mmdet.PackDetInputs'),
            ],
        ),
    ),
)

_pipeline = [
    dict(type='mmdet.LoadImageFromFile'),
    dict(type='mmdet.Resize', scale=(320, 240), keep_ratio=True),
    dict(type='mmdet.LoadAnnotations', with_bbox=True),
    dict(
        type='mmdet.PackDetInputs',  # the metric needs 'instances', which a file of annotations has elsewhere
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
_scored = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_dataloader = dict(
    _scored, dataset=dict(_cells, ann_file='ImageSets/Main/val.txt', test_mode=True, pipeline=_pipeline)
)
test_dataloader = dict(
    _scored, dataset=dict(_cells, ann_file='ImageSets/Main/test.txt', test_mode=True, pipeline=_pipeline)
)
val_evaluator = dict(type='mmdet.CocoMetric', metric='bbox')
test_evaluator = val_evaluator
del _cells, _pipeline, _scored
