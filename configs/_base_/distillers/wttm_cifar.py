# WTTM (arXiv 2402.11148) as its authors set it for ResNet-56 -> ResNet-20. Their other pairs use other values.
# The paper's A.4, Table 8 (gamma 0.3, which is 1 / tau, and beta 1.5); zkxufo/TTM fe457b3, README.md (-r 1, the CE's
# weight).
wttm = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_wttm=dict(
            type='mmwsl.WeightedLoss',
            loss=dict(type='TTM', tau=1 / 0.3),
            weighting=dict(type='WTTMWeighting', tau=1 / 0.3),
            loss_weight=1.5,
        )
    ),
)
