_base_ = 'wsl_r56_r20_cifar100.py'

model = dict(teacher_ckpt='checkpoints/resnet56-ls_cifar100.pth')
