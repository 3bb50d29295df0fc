"""Train several runs in one process: on a GPU, a step of all of them is one CUDA graph.

A small network leaves a GPU idle while Python launches its kernels. Here Python launches none: a step replays kernels
that were captured once. They make the batch, run the teacher and train all students in parallel. Runs of the same seed
see the same batches, so a teacher that they share runs once.

A run gives the same result as with tools/train.py, from the same initial weights and batches, up to rounding; random
numbers drawn in a network (dropout) differ. Settings that a graph cannot hold are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger, print_log
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmwsl.datasets.device import DeviceDataset
from mmwsl.engine.together.batches import Batches
from mmwsl.engine.together.config import check_alike, check_config, put_on_device
from mmwsl.engine.together.member import Member, saved
from mmwsl.engine.together.steps import Together
from mmwsl.registry import DATASETS, HOOKS


def train_together(configs: Sequence[Config], work_dirs: Sequence[Path], tell: Callable[[str], None] = print) -> None:
    """Train some runs to their end, resuming from the last epoch that all of them have saved.

    Args:
        configs: One for each run, with ``randomness.seed``. Training and validation data, batch size and epochs are the
            same in all.
        work_dirs: One for each run, for its config, log and checkpoints.
        tell: Called with a line after each validation.

    Raises:
        ValueError: If the configs differ where they must not, or have settings that are not possible here.
        RuntimeError: If a loss is no longer finite; checkpoints stay.
    """
    init_default_scope(configs[0].get('default_scope', 'mmpretrain'))
    for cfg in configs:
        check_config(cfg)
        put_on_device(cfg)
    check_alike(configs)
    device = torch.device(get_device())
    loaders = {cfg.randomness.seed: cfg.train_dataloader for cfg in configs}
    dataset = DATASETS.build(configs[0].train_dataloader.dataset)
    batches = {
        seed: Batches(Runner.build_dataloader({**loader, 'dataset': dataset}, seed=seed))
        for seed, loader in loaders.items()
    }
    validation = Runner.build_dataloader(configs[0].val_dataloader)
    steps = len(next(iter(batches.values())).sizes)
    members = [Member(cfg, work_dir, steps, device) for cfg, work_dir in zip(configs, work_dirs, strict=True)]
    for member in members:
        _check(member, batches[member.seed].loader, validation)
        member.cfg.dump(member.work_dir / Path(member.cfg.filename).name)
    begun = _common_epoch(members)
    for member in members if begun else ():
        member.resume(begun)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # every step has the same shapes
        _train(Together(members, batches), begun, validation.dataset, tell)  # type: ignore[arg-type]


def _check(member: Member, training: DataLoader, validation: DataLoader) -> None:
    """Run the config's checks of teacher and labels, as the Runner would before the first step."""
    member.work_dir.mkdir(parents=True, exist_ok=True)
    hooks = [hook for hook in member.cfg.get('custom_hooks') or [] if 'CheckTeacherHook' in hook['type']]
    runner = SimpleNamespace(
        model=member.model,
        cfg=member.cfg,
        hooks=[],
        logger=MMLogger.get_current_instance(),
        train_dataloader=training,
        train_loop=SimpleNamespace(dataloader=training),
        val_loop=SimpleNamespace(dataloader=validation, evaluator=Evaluator(member.cfg.val_evaluator)),
    )
    for hook in hooks or [dict(type='mmwsl.CheckLabelsHook')]:
        HOOKS.build(hook).before_train(runner)


def _train(together: Together, begun: int, validation: DeviceDataset, tell: Callable[[str], None]) -> None:
    """Train epoch by epoch, drawing the next epoch's views while the GPU works."""
    members, first = together.members, together.members[0]
    on_device = first.stream is not None
    drawn = {seed: batches.drawn(begun) for seed, batches in together.batches.items()}
    if on_device and begun < first.epochs:
        together.capture(drawn)
    for epoch in range(begun, first.epochs):
        start = time.perf_counter()
        together.train_epoch(drawn)
        drawn = {seed: batches.drawn(epoch + 1) for seed, batches in together.batches.items()}
        means = [member.means() for member in members]  # waits for the GPU
        seconds = (time.perf_counter() - start) / first.steps
        for member, mean in zip(members, means, strict=True):
            member.log_epoch(epoch + 1, dict(time=seconds, **mean))
        if (epoch + 1) % first.cfg.train_cfg.get('val_interval', 1) == 0 or epoch + 1 == first.epochs:
            for member in members:
                top1 = member.validate(epoch + 1, validation.images, validation.labels)
                member.save(epoch + 1)
                tell(
                    f'epoch {epoch + 1}/{member.epochs} {member.work_dir.name}: top-1 {top1:.2f} %, '
                    f'{1000 * seconds:.2f} ms a step of all'
                )


def _common_epoch(members: Sequence[Member]) -> int:
    """Return the last epoch that all members have saved; 0 if there is none."""
    common = set.intersection(*(set(saved(member.work_dir)) for member in members))
    found = max(common, default=0)
    if not found and any(saved(member.work_dir) for member in members):
        print_log('The runs have no checkpoint of the same epoch, so all of them start again.', 'current')
    return found
