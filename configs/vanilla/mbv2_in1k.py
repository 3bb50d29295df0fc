_base_ = [
    '../_base_/models/mobilenetv2.py',
    '../_base_/datasets/imagenet_bs256.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/default_runtime.py',
]

model = _base_.mobilenetv2
