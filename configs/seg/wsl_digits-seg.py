_base_ = ['student_digits-seg.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.digits_seg_student,
    teacher=_base_.digits_seg_teacher,
    teacher_ckpt='checkpoints/digits-seg_teacher.pth',
    distiller=dict(
        type='mmwsl.WSLDistiller',
        # 1 / tau^2: with more, such a small network falls behind the student alone
        distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=2.0, loss_weight=0.25)),
    ),
)
