# NKD (arXiv 2303.13005) as its authors set it on CIFAR-100, for ResNet-34 -> ResNet-18: they have no smaller pair.
# yzd-v/cls_KD 1e5d48f, configs/distillers/cifar100/res34_distill_res18_cifar.py (temp 3, gamma 3.5; CE weight 1).
nkd = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(loss_nkd=dict(type='mmwsl.WeightedLoss', loss=dict(type='NKD', tau=3.0, gamma=3.5))),
)
