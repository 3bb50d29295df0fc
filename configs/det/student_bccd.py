_base_ = [
    '../_base_/models/bccd.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/bccd_60e.py',
    '../_base_/default_runtime.py',
]

model = _base_.bccd_student

custom_hooks = [*_base_.custom_hooks, dict(type='mmwsl.ChannelsLastHook')]
