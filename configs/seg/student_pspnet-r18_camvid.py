# Not trained here.
_base_ = [
    '../_base_/models/pspnet_camvid.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/segmentation_80k.py',
]

model = _base_.camvid_student
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=20000, by_epoch=False)]
train_cfg = dict(max_iters=20000, val_interval=2000)
