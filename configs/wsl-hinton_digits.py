_base_ = 'kd-hinton_digits.py'

model = dict(distiller=dict(distill_losses=dict(loss_kd=dict(weighting=dict(type='WSLWeighting')))))
