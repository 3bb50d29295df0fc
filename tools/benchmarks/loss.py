"""Time and memory of WSLLoss, forward and backward, against plain KD and against MMRazor's WSLD, in one run.

They take turns, step by step, so that whatever else the machine does falls on all of them, in several processes, since
where a process finds its memory changes times as well. Medians and ratios are printed and written to a JSON file with
the machine's description, beside a plot.
"""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import caption, describe
from mmrazor.models.losses import WSLD
from torch import Tensor
from torch.nn import functional as F

from mmwsl.models.losses import WSLLoss

SHAPES = [(64, 100), (256, 1000), (1024, 1000), (4096, 1000), (65536, 19), (8, 19, 128, 128)]
TAU = 2.0
WARM_UP = 3  # steps of each contestant that are not counted: kernels are compiled, memory is taken


def plain_kd(preds_S: Tensor, preds_T: Tensor, target: Tensor) -> Tensor:
    return F.kl_div((preds_S / TAU).log_softmax(1), (preds_T / TAU).softmax(1), reduction='batchmean')


def losses(shape: tuple[int, ...]) -> dict[str, Callable]:
    """What is compared; WSLD takes two dimensions only."""
    torch._dynamo.reset()  # kernels for this shape, not for any
    contestants: dict[str, Callable] = {'WSLLoss': WSLLoss(tau=TAU), 'plain KD': plain_kd,
                                        'WSLLoss compiled': WSLLoss(tau=TAU, compile=True)}
    if len(shape) == 2:
        contestants['WSLD (mmrazor)'] = WSLD(tau=TAU, loss_weight=2.5, num_classes=shape[1])
    return contestants


def step(loss: Callable, inputs: tuple[Tensor, ...]) -> None:
    inputs[0].grad = None
    loss(*inputs).backward()


def seconds(loss: Callable, inputs: tuple[Tensor, ...], device: str) -> float:
    start = time.perf_counter()
    step(loss, inputs)
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(loss: Callable, inputs: tuple[Tensor, ...], device: str) -> int:
    """Bytes above what was allocated before the step, at the worst moment of it."""
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


def measure(shape: tuple[int, ...], device: str, dtype: torch.dtype, rounds: int) -> tuple[dict, dict]:
    """Seconds of each step of each contestant, and the memory that each holds, in logits tensors."""
    generator = torch.Generator(device).manual_seed(0)
    preds_S, preds_T = torch.randn(2, *shape, generator=generator, device=device).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator, device=device)
    inputs = (preds_S.clone().requires_grad_(), preds_T, target)
    contestants = losses(shape)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, loss in contestants.items():
            times[name].append(seconds(loss, inputs, device))
    size = preds_S.numel() * preds_S.element_size()
    return ({name: values[WARM_UP:] for name, values in times.items()},
            {name: peak_memory(loss, inputs, device) / size for name, loss in contestants.items()})


def measured_row(shape: tuple[int, ...], processes: int, *settings: Any) -> dict:
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        runs = [pool.submit(measure, shape, *settings).result() for _ in range(processes)]
    times = {name: [value for run, _ in runs for value in run[name]] for name in runs[0][0]}
    return {
        'shape': list(shape),
        'milliseconds': {name: 1e3 * statistics.median(values) for name, values in times.items()},
        'memory / logits': runs[0][1],
    }


def print_table(rows: list[dict]) -> None:
    print(f'{"logits":20} {"WSLLoss ms":>10} {"/ KD":>6} {"/ WSLD":>6} {"compiled / KD":>13}   '
          'memory beside the inputs, in logits tensors')
    for row in rows:
        times = row['milliseconds']
        wsld = times.get('WSLD (mmrazor)')
        ratio = f'{times["WSLLoss"] / wsld:6.2f}' if wsld else '     -'
        memory = ', '.join(f'{name} {value:.2f}' for name, value in row['memory / logits'].items())
        kd = times['WSLLoss'] / times['plain KD']
        compiled = times['WSLLoss compiled'] / times['plain KD']
        print(f'{row["shape"]!s:20} {times["WSLLoss"]:10.3f} {kd:6.2f} {ratio} {compiled:13.2f}   {memory}')


def draw(rows: list[dict], machine: dict, path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4), layout='constrained')
    names = ['WSLLoss', 'WSLLoss compiled', 'plain KD', 'WSLD (mmrazor)']
    for offset, (name, hatch) in enumerate(zip(names, ('', 'xx', '//', '..'), strict=True)):
        values = [row['milliseconds'].get(name, 0) / row['milliseconds']['plain KD'] for row in rows]
        axes.bar([i + 0.2 * (offset - 1.5) for i in range(len(rows))], values, 0.18, label=name, hatch=hatch)
    axes.set_xticks(range(len(rows)), [' x '.join(map(str, row['shape'])) for row in rows])
    axes.set(ylabel='time of forward + backward / plain KD', xlabel='shape of the logits')
    axes.set_title(caption(machine), fontsize='small')
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--rounds', type=int, default=60, help='in a process')
    parser.add_argument('--processes', type=int, default=5)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks'))
    args = parser.parse_args()
    settings = (args.processes, args.device, getattr(torch, args.dtype), args.rounds)
    rows = [measured_row(shape, *settings) for shape in SHAPES]
    args.out.mkdir(parents=True, exist_ok=True)
    print_table(rows)
    machine = describe(args.device)
    (args.out / 'loss.json').write_text(json.dumps({'machine': machine, 'rows': rows}, indent=1))
    draw(rows, machine, args.out / 'loss.png')
    print(f'{args.out / "loss.json"}, {args.out / "loss.png"}')


if __name__ == '__main__':
    main()
