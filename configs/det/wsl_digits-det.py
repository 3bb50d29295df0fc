_base_ = ['student_digits-det.py', '../_base_/distillers/wsl_det.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.digits_det_student,
    teacher=_base_.digits_det_teacher,
    teacher_ckpt='checkpoints/digits-det_teacher.pth',
    distiller=_base_.wsl_det,
)
