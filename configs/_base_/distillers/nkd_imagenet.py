# NKD (arXiv 2303.13005) as its authors set it for ResNet-34 -> ResNet-18.
# yzd-v/cls_KD 1e5d48f, configs/distillers/imagenet/res34_distill_res18_img.py (temp 1, gamma 1.5; CE weight 1).
nkd = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(loss_nkd=dict(type='mmwsl.WeightedLoss', loss=dict(type='NKD', tau=1.0, gamma=1.5))),
)
