"""Everything around a run: starting it, its hooks, building a teacher cache, measuring a teacher's losses."""

import mmwsl.compat  # noqa: F401  readies the stack
from mmwsl.engine import console, launch, runs
from mmwsl.engine.cache_building import build_cache
from mmwsl.engine.config_checks import explained_config, merge_options
from mmwsl.engine.data_checks import check_data, explained_data
from mmwsl.engine.hooks import (
    BestCheckpointHook,
    ChannelsLastHook,
    CheckLabelsHook,
    CheckResumeHook,
    CheckTeacherHook,
    EpochSeedHook,
    ExactResumeHook,
    FiniteLossHook,
    HardLossHook,
    LateScalarsHook,
    LossStatisticsHook,
    ProgressHook,
    RunReportHook,
    SampleRecordHook,
    StopOnSignalHook,
)
from mmwsl.engine.launch import (
    add_hooks,
    add_progress,
    finish_run,
    launcher_parser,
    prepare_run,
    read_config,
    sole_training,
)
from mmwsl.engine.resume import latest_checkpoint
from mmwsl.engine.strategies import FullyShardStrategy, choose_strategy, prepare_strategy
from mmwsl.engine.teacher_losses import calibrate, measure_losses

__all__ = [
    'BestCheckpointHook',
    'ChannelsLastHook',
    'CheckLabelsHook',
    'CheckResumeHook',
    'CheckTeacherHook',
    'EpochSeedHook',
    'ExactResumeHook',
    'FiniteLossHook',
    'FullyShardStrategy',
    'HardLossHook',
    'LateScalarsHook',
    'LossStatisticsHook',
    'ProgressHook',
    'RunReportHook',
    'SampleRecordHook',
    'StopOnSignalHook',
    'add_hooks',
    'add_progress',
    'build_cache',
    'calibrate',
    'check_data',
    'choose_strategy',
    'console',
    'explained_config',
    'explained_data',
    'finish_run',
    'latest_checkpoint',
    'launch',
    'launcher_parser',
    'measure_losses',
    'merge_options',
    'prepare_run',
    'prepare_strategy',
    'read_config',
    'runs',
    'sole_training',
]
