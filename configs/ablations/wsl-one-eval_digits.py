_base_ = 'wsl-one_digits.py'

model = dict(teacher_norm_eval=True)
