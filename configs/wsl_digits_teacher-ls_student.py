_base_ = 'wsl_digits.py'

model = dict(teacher_ckpt='checkpoints/digits_teacher-ls.pth')
