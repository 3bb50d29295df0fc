_base_ = [
    '../_base_/models/digits_seg.py',
    '../_base_/datasets/digit_scenes_seg.py',
    '../_base_/schedules/digits_seg_20e.py',
    '../_base_/default_runtime.py',
]

model = _base_.digits_seg_student
