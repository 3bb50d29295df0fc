_base_ = 'kd-hinton_r34_r18_in1k.py'

model = dict(distiller=dict(distill_losses=dict(loss_kd=dict(weighting=dict(type='WSLWeighting')))))
