_base_ = '../wsl_digits.py'

model = dict(teacher_norm_eval=True)
