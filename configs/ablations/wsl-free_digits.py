# L_s and L_t divided by their running means: a weight whose scale no longer depends on how sure the teacher is.
_base_ = '../wsl_digits.py'

model = dict(
    distiller=dict(distill_losses=dict(loss_wsl=dict(weighting=dict(type='mmwsl.WSLWeighting', scale_free=True))))
)
