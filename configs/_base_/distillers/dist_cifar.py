# DIST (arXiv 2205.10536) as its authors set it on CIFAR-100, for all pairs.
# hunto/image_classification_sota 6f7a70a, to which hunto/DIST_KD refers, configs/strategies/distill/dist_cifar.yaml
# (ori_loss_weight 1, kd_loss_weight 2, kd dist_t4) and lib/models/losses/kd_loss.py (beta 1, gamma 1).
dist = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_dist=dict(type='mmwsl.WeightedLoss', loss=dict(type='DIST', tau=4.0, beta=1.0, gamma=1.0), loss_weight=2.0)
    ),
)
