"""Hooks: what must happen at a certain moment of a run."""
from mmwsl.engine.hooks.channels_last_hook import ChannelsLastHook
from mmwsl.engine.hooks.check_labels_hook import CheckLabelsHook
from mmwsl.engine.hooks.check_resume_hook import CheckResumeHook
from mmwsl.engine.hooks.check_teacher_hook import CheckTeacherHook
from mmwsl.engine.hooks.epoch_seed_hook import EpochSeedHook
from mmwsl.engine.hooks.exact_resume_hook import ExactResumeHook
from mmwsl.engine.hooks.finite_loss_hook import FiniteLossHook
from mmwsl.engine.hooks.late_scalars_hook import LateScalarsHook
from mmwsl.engine.hooks.loss_statistics_hook import LossStatisticsHook
from mmwsl.engine.hooks.sample_record_hook import SampleRecordHook

__all__ = [
    'ChannelsLastHook', 'CheckLabelsHook', 'CheckResumeHook', 'CheckTeacherHook', 'EpochSeedHook', 'ExactResumeHook',
    'FiniteLossHook', 'LateScalarsHook',
    'LossStatisticsHook', 'SampleRecordHook'
]
