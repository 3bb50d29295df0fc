# The relations between classes are weighted; those between the images of a batch belong to no single image.
_base_ = 'dist_r56_r20_cifar100_8e.py'

model = dict(distiller=dict(distill_losses=dict(loss_dist=dict(weighting=dict(type='WSLWeighting')))))
