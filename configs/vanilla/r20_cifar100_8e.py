_base_ = [
    '../_base_/models/resnet20_cifar.py',
    '../_base_/datasets/cifar100_bs128.py',
    '../_base_/schedules/cifar_8e.py',
    '../_base_/default_runtime.py',
]

model = _base_.resnet20

custom_hooks = [*_base_.custom_hooks, dict(type='mmwsl.ChannelsLastHook')]
