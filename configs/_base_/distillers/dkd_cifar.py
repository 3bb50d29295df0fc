# DKD (arXiv 2203.08679) as its authors set it for ResNet-56 -> ResNet-20. Their other pairs use another beta.
# megvii-research/mdistiller a08d46f, configs/cifar100/dkd/res56_res20.yaml (BETA 2) and mdistiller/engine/cfg.py
# (CE_WEIGHT 1, ALPHA 1, T 4, WARMUP 20 of 240 epochs).
dkd = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_dkd=dict(type='mmwsl.WeightedLoss', loss=dict(type='DKD', tau=4.0, alpha=1.0, beta=2.0), warmup_epochs=20)
    ),
)
