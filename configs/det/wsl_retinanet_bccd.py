_base_ = ['student_retinanet_bccd.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.bccd_retinanet_student,
    teacher=_base_.bccd_retinanet_teacher,
    teacher_ckpt='checkpoints/bccd_retinanet_teacher.pth',
    distiller=dict(
        type='mmwsl.WSLDistiller',
        distill_losses=dict(loss_wsl=dict(
            type='mmwsl.WeightedLoss',
            loss=dict(type='BernoulliKD', tau=1.0),
            weighting=dict(type='ProductWeighting', factors=[
                dict(type='WSLWeighting'), dict(type='DisagreementWeighting')]),
            loss_weight=1.0))))
