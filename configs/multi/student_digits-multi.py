_base_ = [
    '../_base_/models/digits_multi.py',
    '../_base_/datasets/digit_scenes_multi.py',
    '../_base_/schedules/digits_10e.py',
    '../_base_/default_runtime.py',
]

model = _base_.multi_student
train_cfg = dict(max_epochs=20, val_interval=5)
auto_scale_lr = dict(base_batch_size=20)
