_base_ = ['wsl_r56_r20_cifar100_8e.py', '_base_/distillers/kd-ls_cifar.py']

model = dict(student_loss_weight=0.1, distiller=dict(_delete_=True, **_base_.kd_ls))
