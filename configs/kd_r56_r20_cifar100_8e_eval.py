_base_ = 'kd_r56_r20_cifar100_8e.py'

model = dict(teacher_norm_eval=True)
