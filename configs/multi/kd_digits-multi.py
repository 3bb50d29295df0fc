_base_ = ['wsl_digits-multi.py']

model = dict(
    distiller=dict(
        distill_losses=dict(
            _delete_=True, loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD', tau=2.0))
        )
    )
)
