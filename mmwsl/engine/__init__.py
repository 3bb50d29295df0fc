"""What happens around a run: starting it, its hooks, building a teacher cache, asking a teacher once."""
import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.engine import launch, runs
from mmwsl.engine.cache_building import build_cache
from mmwsl.engine.config_checks import explained_config
from mmwsl.engine.data_checks import check_data
from mmwsl.engine.hooks import (
    ChannelsLastHook,
    CheckTeacherHook,
    EpochSeedHook,
    LossStatisticsHook,
    SampleRecordHook,
)
from mmwsl.engine.launch import finish_run, launcher_parser, log_statistics_with_the_logger, prepare_run
from mmwsl.engine.teacher_losses import calibrate, measure_losses

__all__ = [
    'ChannelsLastHook', 'CheckTeacherHook', 'EpochSeedHook', 'LossStatisticsHook', 'SampleRecordHook',
    'build_cache', 'calibrate', 'check_data', 'explained_config', 'finish_run', 'launch', 'launcher_parser',
    'log_statistics_with_the_logger', 'measure_losses', 'prepare_run', 'runs'
]
