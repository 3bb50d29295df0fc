# Soft labels weighted by how soft the teacher's are (ER-KD, arXiv 2311.13621). Its entropy at temperature 4 has a mean
# of 1.20 nats over the first batches: the loss_weight gives the weights the scale of wsl_..., 2.25.
_base_ = '../wsl_digits.py'

model = dict(
    distiller=dict(
        distill_losses=dict(
            loss_wsl=dict(weighting=dict(type='mmwsl.EntropyWeighting', tau=4.0), loss_weight=2.25 / 1.2)
        )
    )
)
