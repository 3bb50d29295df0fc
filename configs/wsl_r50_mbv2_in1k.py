_base_ = [
    '_base_/models/resnet50.py',
    '_base_/models/mobilenetv2.py',
    '_base_/datasets/imagenet_bs256.py',
    '_base_/schedules/imagenet_100e.py',
    '_base_/distillers/wsl_imagenet.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.mobilenetv2,
    teacher=_base_.resnet50,
    teacher_ckpt='checkpoints/resnet50_in1k.pth',
    teacher_norm_eval=False,  # batch statistics, as in the authors' code
    distiller=_base_.wsl,
)
