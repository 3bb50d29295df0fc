_base_ = ['wsl_r56_r20_cifar100.py', '_base_/datasets/cifar10.py']

model = dict(
    architecture=_base_.cifar10.network, teacher=_base_.cifar10.network, teacher_ckpt='checkpoints/resnet56_cifar10.pth'
)
data_preprocessor = _base_.cifar10.data_preprocessor
train_dataloader = dict(dataset=dict(dataset=_base_.cifar10.dataset))
val_dataloader = dict(dataset=_base_.cifar10.dataset)
test_dataloader = val_dataloader
