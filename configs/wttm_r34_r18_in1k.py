_base_ = ['wsl_r34_r18_in1k.py', '_base_/distillers/wttm_imagenet.py']

model = dict(distiller=dict(_delete_=True, **_base_.wttm))
