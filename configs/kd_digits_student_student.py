_base_ = ['wsl_digits_student_student.py', '_base_/distillers/kd_cifar.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
