# A smaller teacher: the student's own network.
_base_ = 'wsl_r56_r20_cifar100_8e.py'

model = dict(teacher=_base_.resnet20, teacher_ckpt='checkpoints/resnet20_cifar100.pth')
