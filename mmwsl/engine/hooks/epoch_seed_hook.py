from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmwsl.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Make what an epoch draws a function of (seed, epoch, rank), so that a resumed run repeats an unbroken one.

    mmengine saves no generator state: after resuming, dropout and mixup would draw other numbers. Seeding anew at each
    epoch needs no state at all. It also hands the sampler the seed of the run that is resumed, where the config names
    none. Works with ``mmwsl.SeededViews``, which does the same for the views. A run by iterations, which
    knows no epochs, draws other numbers after resuming.
    """
    priority = 'VERY_HIGH'  # before whatever else an epoch's start draws

    def before_train_epoch(self, runner: Runner) -> None:
        # its own .sampler is another one beside a batch sampler; mmpretrain's vis_scheduler has a loader with neither
        batch_sampler = getattr(runner.train_dataloader, 'batch_sampler', None)
        sampler: Any = getattr(batch_sampler, 'sampler', None)
        if getattr(sampler, 'seed', None) is not None and not runner._randomness_cfg.get('diff_rank_seed', False):
            sampler.seed = runner.seed
        words = np.random.SeedSequence([runner.seed, runner.epoch or runner.iter, get_rank()]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.manual_seed(int(words[2]))
