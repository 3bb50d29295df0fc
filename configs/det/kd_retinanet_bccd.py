# Plain soft labels.
_base_ = ['wsl_retinanet_bccd.py']

model = dict(
    distiller=dict(
        distill_losses=dict(
            _delete_=True,
            loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD', tau=1.0), loss_weight=1.0),
        )
    )
)
