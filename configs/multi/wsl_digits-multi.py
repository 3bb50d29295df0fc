_base_ = ['student_digits-multi.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.multi_student,
    teacher=_base_.multi_teacher,
    teacher_ckpt='checkpoints/digits-multi_teacher.pth',
    distiller=dict(
        type='mmwsl.WSLDistiller',
        distill_losses=dict(
            loss_wsl=dict(
                type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD', tau=2.0), weighting=dict(type='WSLWeighting')
            )
        ),
    ),
)
