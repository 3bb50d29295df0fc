_base_ = 'dkd_r34_r18_in1k.py'

model = dict(distiller=dict(distill_losses=dict(loss_dkd=dict(weighting=dict(type='WSLWeighting')))))
