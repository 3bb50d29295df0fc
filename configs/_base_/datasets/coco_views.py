# mmdet's COCO, its views drawn from the seed.
_base_ = ['mmdet::_base_/datasets/coco_detection.py']

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        type='mmwsl.SeededViews',
        dataset=dict(
            type='CocoDataset',
            data_root='data/coco/',
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline={{_base_.train_pipeline}},
        ),
    ),
)
