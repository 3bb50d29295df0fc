_base_ = 'nkd_digits.py'

model = dict(distiller=dict(distill_losses=dict(loss_nkd=dict(weighting=dict(type='WSLWeighting')))))
