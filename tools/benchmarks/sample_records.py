"""Measure the cost of mmwsl.SampleRecordHook against a step, ResNet-56 -> ResNet-20 on images of CIFAR-100's size.

Step and hook take turns and are timed separately: their ratio does not depend on what else the machine does. The end of
an epoch (gathering, writing and drawing 50,000 records) is divided among the epoch's steps. Images are random and in
memory, so a step is as short as it can be, and the ratio an upper bound.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.visualization import LocalVisBackend, Visualizer
from mmpretrain.structures import DataSample

from mmwsl.analysis.predict import build_model
from mmwsl.engine.hooks import SampleRecordHook

CONFIG = Path(__file__).resolve().parents[2] / 'configs/wsl_r56_r20_cifar100.py'
EPOCH, BATCH, LOG_INTERVAL = 50_000, 64, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args()
    cfg = Config.fromfile(CONFIG)
    cfg.model.teacher_ckpt = None
    model = build_model(cfg)
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        steps, calls, end = measure(model, build_optim_wrapper(model, cfg.optim_wrapper), args.steps, folder)
    step, per_step = median(steps), sum(calls) / len(calls) + end / (EPOCH / BATCH)
    print(
        f'step {1e3 * step:.2f} ms; hook {1e3 * sum(calls) / len(calls):.3f} ms a step, {1e3 * end:.0f} ms an epoch; '
        f'together {100 * per_step / step:.2f} % of a step'
    )


def measure(model: Any, optimizer: Any, count: int, folder: str) -> tuple[list[float], list[float], float]:
    """Return the seconds of each step, of each call of the hook after it, and of the hook at the end of the epoch."""
    hub = MessageHub.get_instance('benchmark')
    visualizer = Visualizer(vis_backends=[LocalVisBackend(folder)], save_dir=folder)
    runner = SimpleNamespace(
        model=model,
        train_loop=None,
        hooks=[LoggerHook(interval=LOG_INTERVAL)],
        epoch=0,
        max_epochs=1,
        train_dataloader=range(EPOCH // BATCH),
        work_dir=folder,
        message_hub=hub,
        visualizer=visualizer,
    )
    hook = SampleRecordHook()
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    batch = dict(
        inputs=torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8),
        data_samples=[DataSample(metainfo=dict(sample_idx=i)).set_gt_label(i) for i in range(BATCH)],
    )
    steps, calls = [], []
    for position in range(EPOCH // BATCH):
        if position < count:
            steps.append(seconds(lambda: model.train_step(batch, optimizer)))
        calls.append(seconds(lambda position=position: hook.after_train_iter(runner, position, batch)))
    return steps, calls[:count], seconds(lambda: hook.after_train_epoch(runner))


def seconds(call: Callable) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == '__main__':
    main()
