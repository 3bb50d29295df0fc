# WTTM (arXiv 2402.11148) as its authors set it for ResNet-34 -> ResNet-18.
# The paper's A.4, Table 10 (gamma 0.8, which is 1 / tau, and beta 1.6).
wttm = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_wttm=dict(
            type='mmwsl.WeightedLoss',
            loss=dict(type='TTM', tau=1 / 0.8),
            weighting=dict(type='WTTMWeighting', tau=1 / 0.8),
            loss_weight=1.6,
        )
    ),
)
