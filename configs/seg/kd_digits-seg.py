_base_ = ['wsl_digits-seg.py']

model = dict(
    distiller=dict(
        distill_losses=dict(
            _delete_=True, loss_kd=dict(type='mmwsl.WSLLoss', tau=2.0, loss_weight=0.25, weighting='one')
        )
    )
)
