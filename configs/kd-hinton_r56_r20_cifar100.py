_base_ = ['wsl_r56_r20_cifar100.py', '_base_/distillers/kd-hinton_cifar.py']

model = dict(student_loss_weight=0.1, distiller=dict(_delete_=True, **_base_.kd_hinton))
