_base_ = [
    '_base_/models/resnet110_cifar.py',
    '_base_/models/resnet20_cifar.py',
    '_base_/datasets/cifar100_bs64.py',
    '_base_/schedules/cifar_240e.py',
    '_base_/distillers/wsl_cifar.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.resnet20,
    teacher=_base_.resnet110,
    teacher_ckpt='checkpoints/resnet110_cifar100.pth',
    teacher_norm_eval=False,  # batch statistics, as in the authors' code
    distiller=_base_.wsl,
)
