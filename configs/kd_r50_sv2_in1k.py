_base_ = ['wsl_r50_sv2_in1k.py', '_base_/distillers/kd_imagenet.py']

model = dict(distiller=dict(_delete_=True, **_base_.kd))
