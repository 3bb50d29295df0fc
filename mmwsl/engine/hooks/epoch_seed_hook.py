from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import BatchSampler

from mmwsl.compat import restart_batches
from mmwsl.datasets.views import InfiniteViewSampler
from mmwsl.engine.runners import counts_iterations
from mmwsl.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed random numbers from (seed, epoch, rank) at each epoch, so that a resumed run repeats an unbroken one.

    mmengine saves no generator state: after resuming, dropout and mixup would draw other numbers. Seeding at each
    epoch needs no state at all. A run by iterations is seeded at each iteration, from (seed, iteration, rank). The hook
    also gives the sampler the seed of the resumed run, if the config names none, and lets a
    ``mmwsl.InfiniteViewSampler`` begin where the run stopped. ``mmwsl.SeededViews`` does the same for the views.
    """

    priority = 'VERY_HIGH'  # before anything else draws at an epoch's start

    def before_train_epoch(self, runner: Runner) -> None:
        # beneath a batch sampler, not the loader's own .sampler; mmpretrain's vis_scheduler has a loader with neither
        batch_sampler = getattr(runner.train_dataloader, 'batch_sampler', None)
        sampler: Any = getattr(batch_sampler, 'sampler', None)
        if getattr(sampler, 'seed', None) is not None and not runner._randomness_cfg.get('diff_rank_seed', False):
            sampler.seed = runner.seed
        if isinstance(sampler, InfiniteViewSampler) and type(batch_sampler) is BatchSampler:
            sampler.skip(runner.iter * batch_sampler.batch_size)
            restart_batches(runner.train_loop)
        _seed(runner.seed, runner.epoch or runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if counts_iterations(runner):
            _seed(runner.seed, runner.iter)


def _seed(seed: int, moment: int) -> None:
    words = np.random.SeedSequence([seed, moment, get_rank()]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
