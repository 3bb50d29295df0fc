_base_ = 'kd-hinton_r56_r20_cifar100_8e.py'

model = dict(distiller=dict(distill_losses=dict(loss_kd=dict(weighting=dict(type='WSLWeighting')))))
