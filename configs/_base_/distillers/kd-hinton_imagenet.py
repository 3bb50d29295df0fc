# Plain soft labels (arXiv 1503.02531) in mdistiller's recipe on ImageNet: 0.5 CE + 0.5 KL at temperature 1.
# The weight of the CE is model.student_loss_weight=0.5.
# megvii-research/mdistiller a08d46f, configs/imagenet/r34_r18/kd.yaml and r50_mv1/kd.yaml (CE_WEIGHT 0.5,
# KD_WEIGHT 0.5, TEMPERATURE 1).
kd_hinton = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='SoftCrossEntropy', tau=1.0), loss_weight=0.5)
    ),
)
