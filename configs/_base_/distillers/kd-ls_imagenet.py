# Plain soft labels on standardised logits (arXiv 2403.01427) as their authors set them for ResNet-34 -> ResNet-18.
# sunshangquan/logit-standardization-KD f6e5aa5, README.md (--base-temp 2 --kd-weight 9) and
# configs/imagenet/r34_r18/kd.yaml (CE_WEIGHT 1; 0.5 before May 2024).
kd_ls = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_kd=dict(
            type='mmwsl.WeightedLoss',
            loss=dict(type='Standardized', loss=dict(type='SoftCrossEntropy', tau=2.0)),
            loss_weight=9.0,
        )
    ),
)
