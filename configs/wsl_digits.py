_base_ = [
    '_base_/models/digits.py',
    '_base_/datasets/digits_bs50.py',
    '_base_/schedules/digits_10e.py',
    '_base_/distillers/wsl_cifar.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmwsl.WSLDistill',
    architecture=_base_.digits_student,
    teacher=_base_.digits_teacher,
    teacher_ckpt='checkpoints/digits_teacher.pth',
    teacher_norm_eval=False,
    distiller=_base_.wsl,
)
