_base_ = ['student_digits-multi.py']

model = dict(_delete_=True, **_base_.multi_teacher)
train_cfg = dict(max_epochs=20)
train_dataloader = dict(
    dataset=dict(dataset=dict(pipeline=[dict(type='RandomCrop', crop_size=64, padding=4), dict(type='PackInputs')]))
)
