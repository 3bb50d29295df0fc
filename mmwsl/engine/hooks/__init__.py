"""Hooks that mmengine calls at certain moments of a run: they check, seed, save, log and report."""

from mmwsl.engine.hooks.best_checkpoint_hook import BestCheckpointHook
from mmwsl.engine.hooks.channels_last_hook import ChannelsLastHook
from mmwsl.engine.hooks.check_labels_hook import CheckLabelsHook
from mmwsl.engine.hooks.check_resume_hook import CheckResumeHook
from mmwsl.engine.hooks.check_teacher_hook import CheckTeacherHook
from mmwsl.engine.hooks.epoch_seed_hook import EpochSeedHook
from mmwsl.engine.hooks.exact_resume_hook import ExactResumeHook
from mmwsl.engine.hooks.finite_loss_hook import FiniteLossHook
from mmwsl.engine.hooks.hard_loss_hook import HardLossHook
from mmwsl.engine.hooks.late_scalars_hook import LateScalarsHook
from mmwsl.engine.hooks.loss_statistics_hook import LossStatisticsHook
from mmwsl.engine.hooks.progress_hook import ProgressHook
from mmwsl.engine.hooks.run_report_hook import RunReportHook
from mmwsl.engine.hooks.sample_record_hook import SampleRecordHook
from mmwsl.engine.hooks.stop_on_signal_hook import StopOnSignalHook

__all__ = [
    'BestCheckpointHook',
    'ChannelsLastHook',
    'CheckLabelsHook',
    'CheckResumeHook',
    'CheckTeacherHook',
    'EpochSeedHook',
    'ExactResumeHook',
    'FiniteLossHook',
    'HardLossHook',
    'LateScalarsHook',
    'LossStatisticsHook',
    'ProgressHook',
    'RunReportHook',
    'SampleRecordHook',
    'StopOnSignalHook',
]
