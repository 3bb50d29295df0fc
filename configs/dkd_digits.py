_base_ = ['wsl_digits.py', '_base_/distillers/dkd_cifar.py']

_base_.dkd.distill_losses.loss_dkd.warmup_epochs = 0  # 20 of 240 epochs: less than one of 10
model = dict(distiller=dict(_delete_=True, **_base_.dkd))
