_base_ = [
    '../_base_/models/mobilenetv2_cifar.py',
    '../_base_/datasets/cifar100_bs64.py',
    '../_base_/schedules/cifar_240e_lr0.01.py',
    '../_base_/default_runtime.py',
]

model = _base_.mobilenetv2
