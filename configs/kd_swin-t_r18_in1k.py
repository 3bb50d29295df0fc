_base_ = ['wsl_swin-t_r18_in1k.py', '_base_/distillers/kd_imagenet.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
