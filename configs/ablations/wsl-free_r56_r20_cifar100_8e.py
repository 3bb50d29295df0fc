# L_s and L_t divided by their running means: a weight whose scale no longer depends on how sure the teacher is.
_base_ = '../wsl_r56_r20_cifar100_8e.py'

model = dict(
    distiller=dict(distill_losses=dict(loss_wsl=dict(weighting=dict(type='mmwsl.WSLWeighting', scale_free=True))))
)
