_base_ = [
    '_base_/models/swin_tiny.py',
    '_base_/models/resnet18.py',
    '_base_/datasets/imagenet_bs256.py',
    '_base_/schedules/imagenet_100e.py',
    '_base_/distillers/wsl_imagenet.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.resnet18,
    teacher=_base_.swin_tiny,
    teacher_ckpt='checkpoints/swin_tiny_in1k.pth',
    distiller=_base_.wsl,
)
