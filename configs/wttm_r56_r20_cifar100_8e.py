_base_ = ['wsl_r56_r20_cifar100_8e.py', '_base_/distillers/wttm_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.wttm))
