"""What happens around a run: starting it, its hooks, building a teacher cache."""
import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.engine import launch, runs
from mmwsl.engine.cache_building import build_cache
from mmwsl.engine.data_checks import check_data
from mmwsl.engine.hooks import (
    ChannelsLastHook,
    CheckTeacherHook,
    EpochSeedHook,
    LossStatisticsHook,
    SampleRecordHook,
)
from mmwsl.engine.launch import finish_run, launcher_parser, log_statistics_with_the_logger, prepare_run

__all__ = [
    'ChannelsLastHook', 'CheckTeacherHook', 'EpochSeedHook', 'LossStatisticsHook', 'SampleRecordHook',
    'build_cache', 'check_data', 'finish_run', 'launch', 'launcher_parser',
    'log_statistics_with_the_logger', 'prepare_run', 'runs'
]
