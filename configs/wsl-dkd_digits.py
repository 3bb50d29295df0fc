_base_ = 'dkd_digits.py'

model = dict(distiller=dict(distill_losses=dict(loss_dkd=dict(weighting=dict(type='WSLWeighting')))))
