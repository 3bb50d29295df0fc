# Plain soft labels on standardised logits (arXiv 2403.01427) as their authors set them for ResNet-56 -> ResNet-20.
# The weight of the CE is model.student_loss_weight=0.1.
# sunshangquan/logit-standardization-KD f6e5aa5, mdistiller/engine/cfg.py (CE_WEIGHT 0.1, KD_WEIGHT 9, TEMPERATURE 2),
# and its log kd,resnet56,resnet20,2,9.
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
