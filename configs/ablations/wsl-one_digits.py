_base_ = '../wsl_digits.py'

model = dict(distiller=dict(distill_losses=dict(loss_wsl=dict(weighting='one'))))
