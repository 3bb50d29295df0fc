# mmseg's Cityscapes in crops of 512 x 1024, its views drawn from the seed.
_base_ = ['mmseg::_base_/datasets/cityscapes.py']

train_dataloader = dict(
    num_workers=4,
    persistent_workers=True,
    sampler=dict(_delete_=True, type='mmwsl.InfiniteViewSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        type='mmwsl.SeededViews',
        dataset=dict(
            type='CityscapesDataset',
            data_root='data/cityscapes/',
            data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
            pipeline={{_base_.train_pipeline}},
        ),
    ),
)
