"""Time training steps of one process and of several on a CPU, ResNet-56 -> ResNet-20 on images of CIFAR-100's size.

All processes are started at once and the ways to train take turns: while one trains alone the others wait. Each process
has its own batch and one thread, so with as many cores as processes and nothing else to do a step takes as long as
alone, but for what is sent through gloo. The processor time of a step does not depend on what else the machine does.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import caption, describe
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmpretrain.structures import DataSample
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from mmwsl.analysis.predict import build_model
from mmwsl.utils.sharding import shard_units

CONFIG = Path(__file__).resolve().parents[2] / 'configs/wsl_r56_r20_cifar100.py'
BATCH = 64
UNIT = 10_000  # parameters, of the 270,000 of the student
ALONE = 'one process'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--steps', type=int, default=5, help='of each way in a round')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks'))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(take_part, (args, folder), args.processes, start_method='spawn')
        rows = json.loads((Path(folder) / 'rows.json').read_text())
    torch.set_num_threads(1)
    machine = describe('cpu')
    print(f'{args.processes} processes, {caption(machine)}')
    for name, row in rows.items():
        print(f'{name:42}' + '; '.join(f'{value:.4g} {what}' for what, value in row.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    found = {'machine': machine, 'processes': args.processes, 'rows': rows}
    (args.out / 'processes.json').write_text(json.dumps(found, indent=1) + '\n')


def take_part(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Run as one of the processes; the first writes the results."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=args.processes)
    steps = {name: training(wrap, shards) for name, (wrap, shards) in WAYS.items()}
    for step in steps.values():
        step(), step()  # the second makes the teacher's fast copy
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            distributed.barrier()
            if name != ALONE or rank == 0:
                times[name].append(timed(step, args.steps))
    if rank == 0:
        (Path(folder) / 'rows.json').write_text(json.dumps(rows_of(times, args.processes)))
    distributed.barrier()
    distributed.destroy_process_group()


def rows_of(times: dict[str, list[tuple[float, float]]], processes: int) -> dict[str, dict[str, float]]:
    """Return medians over rounds, also of ratios to one process, from seconds of the clock and of the processor."""
    rows = {}
    for name, turns in times.items():
        count = 1 if name == ALONE else processes
        ratios = [alone / seconds for (alone, _), (seconds, _) in zip(times[ALONE], turns, strict=True)]
        rows[name] = {
            'ms a step': 1e3 * median(seconds for seconds, _ in turns),
            'ms of processor a step and process': 1e3 * median(used for _, used in turns),
            'times the images a second of one process': count * median(ratios),
        }
    return rows


def timed(step: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Return the seconds per step, by the clock and of the processor."""
    started, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps, (time.process_time() - used) / steps


def training(wrap: Callable[[Any], Any], shards: bool) -> Callable[[], Any]:
    """Return a training step of a wrapped model, always on the same batch."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.teacher_ckpt, cfg.model.teacher_sharding = None, shards
    torch.manual_seed(0)
    model = wrap(build_model(cfg)).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    labels = torch.arange(BATCH)
    batch = dict(
        inputs=torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8),
        data_samples=[DataSample().set_gt_label(label) for label in labels],
    )
    return partial(model.train_step, batch, wrapper)


def sharded(model: nn.Module) -> nn.Module:
    """Shard a model as mmwsl.FullyShardStrategy does."""
    mesh = distributed.device_mesh.init_device_mesh('cpu', (distributed.get_world_size(),))
    for child in model.children():
        shard_units(child, UNIT, partial(fully_shard, mesh=mesh))
    fully_shard(model, mesh=mesh)
    return model


def replicated(model: nn.Module) -> nn.Module:
    """Wrap a model as mmengine does."""
    return MMDistributedDataParallel(model, broadcast_buffers=False)


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    ALONE: (lambda model: model, False),
    'DistributedDataParallel': (replicated, False),
    'fsdp2': (sharded, False),
    'DistributedDataParallel, teacher split': (replicated, True),
}


if __name__ == '__main__':
    main()
