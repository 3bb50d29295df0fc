# WSL's weight alone.
_base_ = ['wsl_digits-det.py']

model = dict(distiller=dict(distill_losses=dict(loss_wsl=dict(weighting=dict(_delete_=True, type='WSLWeighting')))))
