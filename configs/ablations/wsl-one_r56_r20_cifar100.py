_base_ = '../wsl_r56_r20_cifar100.py'

model = dict(distiller=dict(distill_losses=dict(loss_wsl=dict(weighting='one'))))
