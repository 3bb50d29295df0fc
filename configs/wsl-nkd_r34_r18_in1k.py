_base_ = 'nkd_r34_r18_in1k.py'

model = dict(distiller=dict(distill_losses=dict(loss_nkd=dict(weighting=dict(type='WSLWeighting')))))
