# PSPNet, the pair of MMRazor's CWD: mmseg's teacher has 79.76 mIoU, the student alone 74.87.
# Not trained here.
_base_ = ['../_base_/datasets/cityscapes_views.py', '../_base_/schedules/segmentation_80k.py']

model = dict(
    type='mmwsl.WSLDistill',
    architecture=dict(cfg_path='mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', pretrained=False),
    teacher=dict(cfg_path='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py', pretrained=False),
    teacher_ckpt='https://download.openmmlab.com/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x1024_80k_cityscapes/'
    'pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth',
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
