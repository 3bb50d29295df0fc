_base_ = '../wsl_digits_teacher-ls_student.py'

model = dict(distiller=dict(distill_losses=dict(loss_wsl=dict(weighting='one'))))
