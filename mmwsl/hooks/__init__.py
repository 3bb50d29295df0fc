from mmwsl.hooks.channels_last_hook import ChannelsLastHook
from mmwsl.hooks.check_teacher_hook import CheckTeacherHook
from mmwsl.hooks.epoch_seed_hook import EpochSeedHook
from mmwsl.hooks.sample_record_hook import SampleRecordHook

__all__ = ['ChannelsLastHook', 'CheckTeacherHook', 'EpochSeedHook', 'SampleRecordHook']
