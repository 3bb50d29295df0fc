_base_ = 'nkd_r56_r20_cifar100_8e.py'

model = dict(distiller=dict(distill_losses=dict(loss_nkd=dict(weighting=dict(type='WSLWeighting')))))
