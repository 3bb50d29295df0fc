"""What happens around a run: starting it, its hooks, building a teacher cache, asking a teacher once."""
import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.engine import launch, runs
from mmwsl.engine.cache_building import build_cache
from mmwsl.engine.config_checks import explained_config
from mmwsl.engine.data_checks import check_data
from mmwsl.engine.hooks import (
    ChannelsLastHook,
    CheckResumeHook,
    CheckTeacherHook,
    EpochSeedHook,
    FiniteLossHook,
    LateScalarsHook,
    LossStatisticsHook,
    SampleRecordHook,
)
from mmwsl.engine.launch import add_hooks, finish_run, launcher_parser, prepare_run
from mmwsl.engine.resume import latest_checkpoint
from mmwsl.engine.teacher_losses import calibrate, measure_losses

__all__ = [
    'ChannelsLastHook', 'CheckResumeHook', 'CheckTeacherHook', 'EpochSeedHook', 'FiniteLossHook', 'LateScalarsHook',
    'LossStatisticsHook', 'SampleRecordHook', 'add_hooks', 'build_cache', 'calibrate', 'check_data',
    'explained_config', 'finish_run', 'latest_checkpoint', 'launch', 'launcher_parser', 'measure_losses',
    'prepare_run', 'runs'
]
