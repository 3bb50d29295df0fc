# DIST (arXiv 2205.10536) as its authors set it for ResNet-34 -> ResNet-18.
# hunto/image_classification_sota 6f7a70a, to which hunto/DIST_KD refers, configs/strategies/distill/resnet_dist.yaml
# (ori_loss_weight 1, kd_loss_weight 2, kd dist) and lib/models/losses/kd_loss.py (beta 1, gamma 1, tau 1).
dist = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_dist=dict(type='mmwsl.WeightedLoss', loss=dict(type='DIST', tau=1.0, beta=1.0, gamma=1.0), loss_weight=2.0)
    ),
)
