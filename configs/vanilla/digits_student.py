_base_ = [
    '../_base_/models/digits.py',
    '../_base_/datasets/digits_bs50.py',
    '../_base_/schedules/digits_10e.py',
    '../_base_/default_runtime.py',
]

model = _base_.digits_student
