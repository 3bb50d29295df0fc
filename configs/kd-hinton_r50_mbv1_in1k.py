_base_ = ['wsl_r50_mbv1_in1k.py', '_base_/distillers/kd-hinton_imagenet.py']

model = dict(student_loss_weight=0.5, distiller=dict(_delete_=True, **_base_.kd_hinton))
