_base_ = [
    '../_base_/models/digits.py',
    '../_base_/datasets/digits_bs50.py',
    '../_base_/schedules/digits_10e.py',
    '../_base_/default_runtime.py',
]

model = _base_.digits_teacher
train_cfg = dict(max_epochs=30)
# a teacher has the time to see more than the 600 images as they are
train_dataloader = dict(
    dataset=dict(dataset=dict(pipeline=[dict(type='RandomCrop', crop_size=8, padding=1), dict(type='PackInputs')]))
)
