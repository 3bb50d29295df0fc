# WSL's weight and the factor |p_s - p_t|, which turns down the many easy negatives.
_base_ = ['student_digits-det.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.digits_det_student,
    teacher=_base_.digits_det_teacher,
    teacher_ckpt='checkpoints/digits-det_teacher.pth',
    distiller=dict(
        type='mmwsl.WSLDistiller',
        distill_losses=dict(loss_wsl=dict(
            type='mmwsl.WeightedLoss',
            loss=dict(type='BernoulliKD', tau=1.0),
            weighting=dict(type='ProductWeighting', factors=[
                dict(type='WSLWeighting'), dict(type='DisagreementWeighting')]),
            loss_weight=1.0))))
