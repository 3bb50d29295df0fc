_base_ = [
    '_base_/models/wrn40-2_cifar.py',
    '_base_/models/wrn16-2_cifar.py',
    '_base_/datasets/cifar100_bs64.py',
    '_base_/schedules/cifar_240e.py',
    '_base_/distillers/wsl_cifar.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.wrn16_2,
    teacher=_base_.wrn40_2,
    teacher_ckpt='checkpoints/wrn40-2_cifar100.pth',
    teacher_norm_eval=False,  # batch statistics, as in the authors' code
    distiller=_base_.wsl,
)
