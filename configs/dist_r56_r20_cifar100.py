_base_ = ['wsl_r56_r20_cifar100.py', '_base_/distillers/dist_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.dist))
