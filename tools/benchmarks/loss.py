"""Measure time and memory of WSLLoss, forward and backward, against plain KD and against MMRazor's WSLD, in one run.

They take turns, step by step and in a new order each round, so that whatever else the machine does falls on all of
them, in several processes, since their places in memory change times as well. With --baseline the WSLLoss of
another version takes part. Each row of the table is written to a JSON file as soon as it is measured, with the
machine's description, and all are drawn at the end. Steps are counted once kernels are compiled; the first one's time
says how long that took. With --processes 0, all rows are measured in a few seconds without torch.compile, and then
again with it.

The share of the copy bandwidth is the least traffic that a step needs (both logits read once, one gradient written
once), divided by the bytes that copying a large tensor reads and writes on this machine in the same time.

A ratio compares the first contestant with another, round by round: its median in each process, then the median of the
processes, with the lowest and the highest of them to show what the machine's noise is.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import torch
from baseline import loss_of
from machine import caption, describe
from mmrazor.models.losses import WSLD
from torch import Tensor
from torch.nn import functional as F

from mmwsl.models.losses import WSLLoss
from mmwsl.utils import whole_file
from mmwsl.utils.pictures import pyplot

SHAPES = [(64, 100), (256, 1000), (1024, 1000), (4096, 1000), (65536, 19), (8, 19, 128, 128), (2, 19, 512, 512)]
TAU = 2.0
KERNEL = 'WSLLoss triton'  # needs a GPU
COMPILED = 'compiled'  # ends the name of what torch.compile makes
COPIED = 2**28  # bytes that the bandwidth is measured with, on a GPU more than its caches hold
WARM_UP = 3  # steps of each contestant that are not counted: kernels are compiled, memory is taken


def plain_kd(preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
    return F.kl_div((preds_S / TAU).log_softmax(1), (preds_T / TAU).softmax(1), reduction='batchmean')


def of_pixels(loss: Callable) -> Callable:
    """Extend a loss of (N, C) to dense logits, with each pixel as a sample."""

    def flattened(preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
        rows = (preds.movedim(1, -1).reshape(-1, preds.shape[1]) for preds in (preds_S, preds_T))
        return loss(*rows, target.reshape(-1))

    return flattened


# a loss for logits of a shape
CONTESTANTS: dict[str, Callable[[tuple[int, ...]], Callable]] = {
    'WSLLoss': lambda shape: WSLLoss(tau=TAU),
    'plain KD': lambda shape: plain_kd,
    f'WSLLoss {COMPILED}': lambda shape: WSLLoss(tau=TAU, compile=True),
    KERNEL: lambda shape: WSLLoss(tau=TAU, compile='triton'),
    'WSLD (mmrazor)': lambda shape: of_pixels(WSLD(tau=TAU, loss_weight=2.5, num_classes=shape[1])),
}


def losses(shape: tuple[int, ...], names: list[str], baseline: Path | None) -> dict[str, Callable]:
    """Return the losses to compare, by name."""
    torch._dynamo.reset()  # kernels for this shape, not for any
    made = {name: CONTESTANTS[name](shape) for name in names}
    if baseline:
        version, loss = loss_of(baseline)
        made[f'WSLLoss {version}'] = loss(tau=TAU)
    return made


def step(loss: Callable, inputs: tuple[Tensor, ...]) -> None:
    inputs[0].grad = None
    loss(*inputs).backward()


def timed(run: Callable[[], object], device: str) -> float:
    """Return the seconds of a call: of the work on a GPU, or of the call itself on a CPU."""
    if device != 'cuda':
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds(loss: Callable, inputs: tuple[Tensor, ...], device: str) -> float:
    return timed(partial(step, loss, inputs), device)


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    times = [timed(partial(target.copy_, source), device) for _ in range(WARM_UP + 10)]
    return 2 * COPIED / statistics.median(times[WARM_UP:])


def peak_memory(loss: Callable, inputs: tuple[Tensor, ...], device: str) -> int:
    """Return the peak memory of a step, in bytes above what was allocated before it."""
    inputs[0].grad = None
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss, inputs)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def measure(shape: tuple[int, ...], dtype: str, args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Return each contestant's seconds per step by rounds, its memory in tensors of logits, and its first step's."""
    generator, order = torch.Generator(args.device).manual_seed(0), random.Random(0)
    preds_S, preds_T = torch.randn(2, *shape, generator=generator, device=args.device).to(getattr(torch, dtype))
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator, device=args.device)
    inputs = (preds_S.clone().requires_grad_(), preds_T, target)
    contestants = losses(shape, args.contestants, args.baseline)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    while any(len(values) < WARM_UP + args.rounds or sum(values[WARM_UP:]) < args.seconds for values in times.values()):
        # a step finds the caches as the one before left them
        for name in order.sample(list(contestants), len(contestants)):
            times[name].append(seconds(contestants[name], inputs, args.device))
    size = preds_S.numel() * preds_S.element_size()
    memory = {name: peak_memory(loss, inputs, args.device) / size for name, loss in contestants.items()}
    return (
        {name: values[WARM_UP:] for name, values in times.items()},
        memory,
        {name: values[0] for name, values in times.items()},
    )


def runs_of(shape: tuple[int, ...], dtype: str, args: argparse.Namespace) -> list[tuple[dict, dict, dict]]:
    """Return the measurements of each process."""
    if not args.processes:
        return [measure(shape, dtype, args)]
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        return [pool.submit(measure, shape, dtype, args).result() for _ in range(args.processes)]


def measured_row(shape: tuple[int, ...], dtype: str, args: argparse.Namespace, bandwidth: float) -> dict:
    all_times, all_memory, first_steps = zip(*runs_of(shape, dtype, args), strict=True)
    memory = all_memory[0]
    first, *others = memory
    medians = {name: statistics.median(value for times in all_times for value in times[name]) for name in memory}
    least = 3 * math.prod(shape) * getattr(torch, dtype).itemsize
    return {
        'shape': list(shape),
        'dtype': dtype,
        'milliseconds': {name: 1e3 * median for name, median in medians.items()},
        'share of copy bandwidth': {name: least / median / bandwidth for name, median in medians.items()},
        f'{first} / other': {name: [paired_ratio(times[first], times[name]) for times in all_times] for name in others},
        'memory / logits': memory,
        'seconds of the first step': first_steps[0],
    }


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def print_row(row: dict) -> None:
    first = next(iter(row['milliseconds']))
    title = f'{" x ".join(map(str, row["shape"]))}, {row["dtype"]}'
    print(f'{title:32} {"ms":>9} {"of copying":>11} {"memory / logits":>16}   {first} / other')
    for name, value in row['milliseconds'].items():
        ratios = row[f'{first} / other'].get(name)
        spread = f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})' if ratios else ''
        print(
            f'  {name:30} {value:9.3f} {row["share of copy bandwidth"][name]:11.3f} '
            f'{row["memory / logits"][name]:16.2f}   {spread}',
            flush=True,
        )


def draw(rows: list[dict], machine: dict, path: Path) -> None:
    """Draw bars of every contestant's time over the first one's, a group for each row."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(max(8, 2 * len(rows)), 4), layout='constrained')
    names = list({name: None for row in rows for name in row['milliseconds']})
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [row['milliseconds'].get(name, 0) / row['milliseconds'][names[0]] for row in rows]
        offset = width * (place - (len(names) - 1) / 2)
        axes.bar(
            [i + offset for i in range(len(rows))],
            values,
            0.9 * width,
            label=name,
            hatch=('', 'xx', '//', '..', '++')[place % 5],
        )
    axes.set_xticks(range(len(rows)), [f'{" x ".join(map(str, row["shape"]))}\n{row["dtype"]}' for row in rows])
    axes.set(ylabel=f'time of forward + backward / {names[0]}', xlabel='shape and type of the logits')
    axes.set_title(caption(machine), fontsize='small')
    figure.legend(loc='outside right upper')
    figure.savefig(path, dpi=120)


def looks(args: argparse.Namespace) -> list[list[str]]:
    """Return the contestants of a first pass over all rows, and of a second pass whose rows replace the first's."""
    at_once = [name for name in args.contestants if not name.endswith(COMPILED)]
    if args.processes or len(at_once) in (0, len(args.contestants)):
        return [args.contestants]
    return [at_once, args.contestants]


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split('x')))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--shapes', nargs='+', type=shape_of, default=SHAPES, metavar='NxC')
    parser.add_argument('--contestants', nargs='+', choices=CONTESTANTS, help=f'default: all, {KERNEL} on a GPU alone')
    parser.add_argument(
        '--baseline', type=Path, metavar='CHECKOUT', help="folder with another version's tree, whose WSLLoss takes part"
    )
    parser.add_argument('--rounds', type=int, default=60, help='least number of rounds in a process')
    parser.add_argument(
        '--seconds', type=float, default=1.0, help='least time for the steps of each contestant in a process'
    )
    parser.add_argument(
        '--processes', type=int, default=5, help='that measure one after the other; 0: only this one, in a short time'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks'))
    args = parser.parse_args()
    args.contestants = args.contestants or [name for name in CONTESTANTS if args.device == 'cuda' or name != KERNEL]
    return args


def main() -> None:
    args = parse_args()
    bandwidth = copy_bandwidth(args.device)
    machine, found = {**describe(args.device), 'copied bytes a second': bandwidth}, {}
    for names in looks(args):
        for shape, dtype in product(args.shapes, args.dtype):
            row = measured_row(shape, dtype, argparse.Namespace(**{**vars(args), 'contestants': names}), bandwidth)
            print_row(row)
            found[shape, dtype] = row
            with whole_file(args.out / 'loss.json') as file:  # a run that is cut off keeps its rows
                file.write(json.dumps({'machine': machine, 'rows': list(found.values())}, indent=1).encode())
    draw(list(found.values()), machine, args.out / 'loss.png')
    print(f'{args.out / "loss.json"}, {args.out / "loss.png"}')


if __name__ == '__main__':
    main()
