# DKD (arXiv 2203.08679) as its authors set it for ResNet-34 -> ResNet-18.
# megvii-research/mdistiller a08d46f, configs/imagenet/r34_r18/dkd.yaml (CE_WEIGHT 1, BETA 0.5, T 1, WARMUP 1, which is
# none) and mdistiller/engine/cfg.py (ALPHA 1).
dkd = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(loss_dkd=dict(type='mmwsl.WeightedLoss', loss=dict(type='DKD', tau=1.0, alpha=1.0, beta=0.5))),
)
