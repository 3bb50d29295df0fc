_base_ = ['student_bccd.py', '../_base_/distillers/wsl_det.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.bccd_student,
    teacher=_base_.bccd_teacher,
    teacher_ckpt='checkpoints/bccd_teacher.pth',
    distiller=_base_.wsl_det,
)
