# Plain soft labels (arXiv 1503.02531) at the temperature and weight of wsl_imagenet.py: the sample weights are all that
# differs.
kd = dict(
    type='mmwsl.WSLDistiller', distill_losses=dict(loss_kd=dict(type='mmrazor.KLDivergence', tau=2.0, loss_weight=2.5))
)
