_base_ = [
    '../_base_/models/digits_det.py',
    '../_base_/datasets/digit_scenes_det.py',
    '../_base_/schedules/digits_det_20e.py',
    '../_base_/default_runtime.py',
]

model = _base_.digits_det_teacher
