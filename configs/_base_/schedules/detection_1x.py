# mmdet's 12 epochs, resumable to exactly the same weights.
_base_ = ['mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']

optim_wrapper = dict(optimizer=dict(lr=0.01))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
custom_hooks = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.CheckTeacherHook')]
