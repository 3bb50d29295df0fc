# The weights of wsl-oof in random order within the batch: the same distribution, but given to other images.
_base_ = 'wsl-oof_r56_r20_cifar100_8e.py'

_base_.model.distiller.distill_losses.loss_wsl.weighting = dict(
    type='mmwsl.ShuffledWeighting', of=_base_.model.distiller.distill_losses.loss_wsl.weighting
)
