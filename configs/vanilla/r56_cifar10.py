_base_ = ['r56_cifar100.py', '../_base_/datasets/cifar10.py']

model = _base_.cifar10.network
data_preprocessor = _base_.cifar10.data_preprocessor
train_dataloader = dict(dataset=dict(dataset=_base_.cifar10.dataset))
val_dataloader = dict(dataset=_base_.cifar10.dataset)
test_dataloader = val_dataloader
