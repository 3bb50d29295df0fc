from mmwsl.hooks.check_teacher_hook import CheckTeacherHook
from mmwsl.hooks.epoch_seed_hook import EpochSeedHook

__all__ = ['CheckTeacherHook', 'EpochSeedHook']
