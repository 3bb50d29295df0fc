_base_ = ['wsl_digits.py', '_base_/distillers/wttm_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.wttm))
