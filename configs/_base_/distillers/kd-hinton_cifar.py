# Plain soft labels (arXiv 1503.02531) in the usual recipe on CIFAR-100: 0.1 CE + 0.9 tau^2 KL.
# The weight of the CE is model.student_loss_weight=0.1.
# HobbitLong/RepDistiller b84f547, scripts/run_cifar_distill.sh (-r 0.1 -a 0.9) and train_student.py (kd_T 4);
# megvii-research/mdistiller a08d46f, mdistiller/engine/cfg.py has the same.
kd_hinton = dict(
    type='mmwsl.WSLDistiller',
    distill_losses=dict(
        loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='SoftCrossEntropy', tau=4.0), loss_weight=0.9)
    ),
)
