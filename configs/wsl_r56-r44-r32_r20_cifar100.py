_base_ = [
    '_base_/models/resnet56_cifar.py',
    '_base_/models/resnet44_cifar.py',
    '_base_/models/resnet32_cifar.py',
    '_base_/models/resnet20_cifar.py',
    '_base_/datasets/cifar100_bs64.py',
    '_base_/schedules/cifar_240e.py',
    '_base_/distillers/wsl_cifar.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.resnet20,
    teacher=dict(
        type='mmwsl.EnsembleTeacher',
        models=[_base_.resnet56, _base_.resnet44, _base_.resnet32],
        ckpts=[
            'checkpoints/resnet56_cifar100.pth',
            'checkpoints/resnet44_cifar100.pth',
            'checkpoints/resnet32_cifar100.pth',
        ],
    ),
    teacher_norm_eval=False,  # batch statistics, as in the authors' code
    distiller=_base_.wsl,
)
