# RTMDet, by its own recipe: mmdet's teacher has 44.5 box AP, the student alone 40.9.
# Mosaics are made of images that a worker has seen before, so a resumed run sees other ones than an unbroken run.
# Not trained here.
_base_ = ['mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py']

model = dict(
    _delete_=True,
    type='mmwsl.WSLDistill',
    architecture=dict(cfg_path='mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', pretrained=False),
    teacher=dict(cfg_path='mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', pretrained=False),
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/'
    'rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], bgr_to_rgb=False
    ),
    distiller=dict(type='mmwsl.WSLDistiller'),
)
