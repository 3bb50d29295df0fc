_base_ = ['wsl_r20_r20_cifar100_8e.py', '_base_/distillers/kd_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
