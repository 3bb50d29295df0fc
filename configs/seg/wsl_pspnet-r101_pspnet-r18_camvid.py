# No zoo has a teacher for CamVid: teacher_pspnet-r101_camvid.py trains it. Not trained here.
_base_ = ['student_pspnet-r18_camvid.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=_base_.camvid_student,
    teacher=_base_.camvid_teacher,
    teacher_ckpt='checkpoints/pspnet-r101_camvid.pth',
    data_preprocessor=_base_.data_preprocessor,
    distiller=dict(
        type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=2.0, loss_weight=1.0))
    ),
)
