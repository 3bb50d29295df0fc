# WSL's weight and the factor |p_s - p_t|, which turns down the many easy negatives.
wsl_det = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_wsl=dict(
            type='mmwsl.WeightedLoss',
            loss=dict(type='BernoulliKD', tau=1.0),
            weighting=dict(
                type='ProductWeighting', factors=[dict(type='WSLWeighting'), dict(type='DisagreementWeighting')]
            ),
            loss_weight=1.0,
        )
    ),
)
