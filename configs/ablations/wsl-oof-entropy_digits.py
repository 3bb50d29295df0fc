# Softness x need: the teacher's entropy times WSL's weight with L_t of networks that never saw the image. 2.25 / 1.2
# gives the entropy a mean of 1 (kd-entropy_...), 3.4 / 2.25 restores what the weight takes away on average.
_base_ = 'wsl-oof_digits.py'

_need = _base_.model.distiller.distill_losses.loss_wsl.weighting
model = dict(
    distiller=dict(
        distill_losses=dict(
            loss_wsl=dict(
                weighting=dict(
                    _delete_=True,
                    type='mmwsl.ProductWeighting',
                    factors=[dict(type='mmwsl.EntropyWeighting', tau=4.0), _need],
                ),
                loss_weight=3.4 / 1.2,
            )
        )
    )
)
del _need
