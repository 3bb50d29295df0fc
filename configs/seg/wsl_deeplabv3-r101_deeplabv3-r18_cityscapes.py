# DeepLabV3: mmseg's teacher has 80.20 mIoU, the student alone 76.70.
# Not trained here.
_base_ = ['../_base_/datasets/cityscapes_views.py', '../_base_/schedules/segmentation_80k.py']

model = dict(
    type='mmwsl.WSLDistill',
    architecture=dict(cfg_path='mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py', pretrained=False),
    teacher=dict(cfg_path='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py', pretrained=False),
    teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/deeplabv3/deeplabv3_r101-d8_512x1024_80k_cityscapes/'
    'deeplabv3_r101-d8_512x1024_80k_cityscapes_20200606_113503-9e428899.pth',
    data_preprocessor=dict(
        type='mmseg.SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 1024),
    ),
    distiller=dict(
        type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=2.0, loss_weight=1.0))
    ),
)
