_base_ = ['wsl_r110_r32_cifar100.py', '_base_/distillers/kd_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
