_base_ = ['wsl_wrn40-2_sv1_cifar100.py', '_base_/distillers/kd_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
