_base_ = [
    '../_base_/models/bccd_retinanet.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/bccd_60e.py',
    '../_base_/default_runtime.py',
]

model = _base_.bccd_retinanet_teacher

custom_hooks = [*_base_.custom_hooks, dict(type='mmwsl.ChannelsLastHook')]
