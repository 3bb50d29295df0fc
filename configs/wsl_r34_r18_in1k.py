_base_ = [
    '_base_/models/resnet34.py',
    '_base_/models/resnet18.py',
    '_base_/datasets/imagenet_bs256.py',
    '_base_/schedules/imagenet_100e.py',
    '_base_/distillers/wsl_imagenet.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.resnet18,
    teacher=_base_.resnet34,
    teacher_ckpt='checkpoints/resnet34_in1k.pth',
    teacher_norm_eval=False,  # batch statistics, as in the authors' code
    distiller=_base_.wsl,
)
