# A weak teacher: the student's own network, trained alone.
_base_ = 'wsl_digits.py'

model = dict(teacher=_base_.digits_student, teacher_ckpt='checkpoints/digits_student.pth')
