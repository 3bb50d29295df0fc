# mmseg's 80,000 iterations, resumable to exactly the same weights.
_base_ = ['mmseg::_base_/schedules/schedule_80k.py', 'mmseg::_base_/default_runtime.py']

default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
custom_hooks = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.CheckTeacherHook')]
auto_scale_lr = dict(enable=False, base_batch_size=8)
