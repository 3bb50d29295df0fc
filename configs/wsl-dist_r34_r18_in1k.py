# The relations between classes are weighted; those between the images of a batch belong to no single image.
_base_ = 'dist_r34_r18_in1k.py'

model = dict(distiller=dict(distill_losses=dict(loss_dist=dict(weighting=dict(type='WSLWeighting')))))
