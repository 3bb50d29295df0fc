"""Time of a training step, ResNet-56 -> ResNet-20 on CIFAR-100: what does the teacher cost, and what the framework?

The arms take turns, step by step, so that whatever else the machine does falls on all of them: a bare PyTorch loop over
the student alone (the floor); the forward pass of the teacher, in eval mode and without gradient; the student alone
through mmengine's Runner, also with its images kept on the device; mmwsl with its teacher in eval mode, as it comes and
with every option (compiled, bfloat16), with batch statistics, and cached; MMRazor's SingleTeacherDistill with WSLD, as
it comes and with mmwsl's ChannelsLastHook, which all other arms through a Runner have too. All have the same networks,
images and batch size, and read their images in the same process. Medians and ratios are printed and written to a JSON
file with the machine's description, beside a plot.
"""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import os
import random
import shutil
import statistics
import threading
import time
from pathlib import Path

import torch
from machine import caption, describe
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmwsl.engine.cache_building import build_cache
from mmwsl.utils import load_network

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {'vanilla': 'vanilla/r20_cifar100', 'vanilla, device': 'vanilla/r20_cifar100',
           'cached': 'wsl_r56_r20_cifar100_cached'}
LAYOUT = dict(type='mmwsl.ChannelsLastHook', device_type=None)


class Turns:
    """Lets threads take steps one after the other, and times each step.

    Each round has its own order, since a step finds the caches and threads as the one before it left them.
    """

    def __init__(self, arms: list[str]) -> None:
        self.gates = {arm: threading.Semaphore(0) for arm in arms}
        self.times: dict[str, list[float]] = {arm: [] for arm in arms}
        self.started = 0.0
        self.order = random.Random(0)
        self.waiting: list[str] = []

    def begin(self) -> None:
        """Let the next arm take its step."""
        if not self.waiting:
            self.waiting = self.order.sample(list(self.gates), len(self.gates))
        self.gates[self.waiting.pop()].release()

    def wait(self, arm: str) -> None:
        self.gates[arm].acquire()
        self.started = time.perf_counter()

    def done(self, arm: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[arm].append(time.perf_counter() - self.started)
        self.begin()


@HOOKS.register_module()
class TurnsHook(Hook):
    """A step of the Runner, from after one iteration to after the next: data, hooks and all."""
    priority = 'LOWEST'
    turns: Turns  # set below: a config holds only data

    def __init__(self, arm: str) -> None:
        self.arm = arm

    def before_train_epoch(self, runner: Runner) -> None:
        self.turns.wait(self.arm)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None,
                         outputs: object = None) -> None:
        self.turns.done(self.arm)
        if batch_idx + 1 < len(runner.train_dataloader):
            self.turns.wait(self.arm)


def config_of(arm: str, steps: int, teacher: str, data: Path, out: Path) -> Config:
    name = CONFIGS.get(arm, 'wsl_r56_r20_cifar100')
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    if arm == 'vanilla, device':
        base = Config.fromfile(ROOT / 'configs/_base_/datasets/cifar100_bs64_device.py')
        cfg.train_dataloader = base.train_dataloader
    cfg.merge_from_dict(dict(
        work_dir=str(out / arm), experiment_name=f'{arm} {time.time()}', log_level='ERROR',
        train_cfg=dict(max_epochs=1),
        train_dataloader=dict(num_batch_per_epoch=steps, num_workers=0, persistent_workers=False, pin_memory=False),
        val_cfg=None, val_dataloader=None, val_evaluator=None,
        custom_hooks=[*([] if arm == 'mmrazor' else [LAYOUT]), dict(type='TurnsHook', arm=arm)],
        randomness=dict(seed=0)))
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1)
    cfg.train_dataloader.dataset.dataset.data_root = str(data)
    if arm.startswith('vanilla'):
        return cfg
    cfg.model.teacher_ckpt = teacher
    cfg.model.teacher_norm_eval = arm != 'wsl, batch statistics'
    if arm == 'cached':
        # the images that the steps see are all that is taught before
        cfg.train_dataloader.dataset.dataset.indices = steps * cfg.train_dataloader.batch_size
        cfg.model.teacher_cache = cfg.train_dataloader.dataset.cache = str(out / 'teacher_cache')
    cfg.model.teacher_speed = 'compile_bf16' if arm == 'wsl, every option' else 'fold'
    if arm.startswith('mmrazor'):
        peer = Config.fromfile(ROOT / 'configs/mmrazor_r56_r20_cifar100_8e.py').model
        del cfg.model.teacher_speed
        cfg.model.type, cfg.model.distiller = peer.type, peer.distiller
    return cfg


def bare_loop(steps: int, turns: Turns, data: Path) -> None:
    """The student alone, as a script without a framework would train it."""
    cfg = Config.fromfile(ROOT / 'configs/vanilla/r20_cifar100.py')
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, pin_memory=False, num_batch_per_epoch=steps)
    cfg.train_dataloader.dataset.dataset.data_root = str(data)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    model = MODELS.build(cfg.model).to(device)
    model.to(memory_format=torch.channels_last)  # as LAYOUT
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(cfg.data_preprocessor[key], device=device).view(3, 1, 1) for key in ('mean', 'std'))
    model.train()
    batches = iter(loader)
    for _ in range(steps):
        turns.wait('bare')
        batch = next(batches)
        labels = torch.cat([sample.gt_label for sample in batch['data_samples']]).to(device)
        images = (batch['inputs'].to(device).float() - mean) / std
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turns.done('bare')


def measure(steps: int, teacher: str, data: Path, out: Path) -> dict[str, list[float]]:
    """Seconds of each arm's steps but the first five, by arm."""
    arms = ['bare', 'teacher', 'vanilla', 'vanilla, device', 'wsl, eval', 'wsl, every option', 'wsl, batch statistics',
            'cached', 'mmrazor', 'mmrazor, channels last']
    turns = TurnsHook.turns = Turns(arms)
    threading.excepthook = end_all
    init_default_scope('mmpretrain')
    shutil.rmtree(out / 'teacher_cache', ignore_errors=True)
    build_cache(config_of('cached', steps, teacher, data, out), out / 'teacher_cache', views=1)
    runners = {arm: Runner.from_cfg(config_of(arm, steps, teacher, data, out)) for arm in arms[2:]}
    for runner in runners.values():
        runner.train_loop  # noqa: B018  reads its data now, while no other thread draws random numbers
    threads = [threading.Thread(target=bare_loop, args=(steps, turns, data)),
               threading.Thread(target=teacher_loop, args=(steps, turns, teacher))]
    threads += [threading.Thread(target=runner.train) for runner in runners.values()]
    for thread in threads:
        thread.start()
    turns.begin()
    for thread in threads:
        thread.join()
    return {arm: times[5:] for arm, times in turns.times.items()}


def end_all(failure: threading.ExceptHookArgs) -> None:
    """The other arms would wait for ever for one that has failed to take its turn."""
    threading.__excepthook__(failure)
    os._exit(1)


def teacher_loop(steps: int, turns: Turns, path: str) -> None:
    """The teacher's forward pass by itself, for scale."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = MODELS.build(Config.fromfile(ROOT / 'configs/vanilla/r56_cifar100.py').model)
    load_network(model, path)
    model.to(device).eval()
    inputs = torch.randn(64, 3, 32, 32, device=device)
    for _ in range(steps):
        turns.wait('teacher')
        with torch.no_grad():
            model(inputs)
        turns.done('teacher')


def ratios_of(medians: dict[str, float]) -> dict[str, float]:
    def extra(arm: str) -> float:
        return (medians[arm] - medians['vanilla']) / medians['teacher']
    return {
        'vanilla / bare': medians['vanilla'] / medians['bare'],
        'vanilla, device / vanilla': medians['vanilla, device'] / medians['vanilla'],
        '(wsl, eval - vanilla) / teacher': extra('wsl, eval'),
        '(wsl, every option - vanilla) / teacher': extra('wsl, every option'),
        'cached / vanilla': medians['cached'] / medians['vanilla'],
        'wsl, eval / mmrazor': medians['wsl, eval'] / medians['mmrazor'],
        'wsl, eval / mmrazor, channels last': medians['wsl, eval'] / medians['mmrazor, channels last'],
        'wsl, every option / mmrazor': medians['wsl, every option'] / medians['mmrazor'],
        'wsl, batch statistics / mmrazor': medians['wsl, batch statistics'] / medians['mmrazor'],
    }


def draw(result: dict, path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4), layout='constrained')
    arms, times = zip(*result['milliseconds'].items(), strict=True)
    bars = axes.barh(arms, times, color='0.8', edgecolor='black')
    axes.bar_label(bars, fmt='%.0f ms', padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel='median time of a step, milliseconds')
    axes.set_title(caption(result['machine']), fontsize='small')
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=20, help='of each arm in a round')
    parser.add_argument('--rounds', type=int, default=4, help='each with networks made anew: where their memory lies '
                        'alone can change a step by a tenth')
    parser.add_argument('--teacher', default='checkpoints/resnet56_cifar100.pth')
    parser.add_argument('--data', type=Path, default=ROOT / 'data/cifar100', help='folder with cifar-100-python')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks'))
    args = parser.parse_args()
    rounds = [measure(args.steps, args.teacher, args.data, args.out) for _ in range(args.rounds)]
    medians = {arm: statistics.median(step for times in rounds for step in times[arm]) for arm in rounds[0]}
    ratios = ratios_of(medians)
    for arm, value in medians.items():
        print(f'{arm:40} {1e3 * value:8.1f} ms')
    for name, value in ratios.items():
        print(f'{name:40} {value:8.2f}')
    machine = describe('cuda' if torch.cuda.is_available() else 'cpu')
    result = {'machine': machine, 'milliseconds': {arm: 1e3 * value for arm, value in medians.items()},
              'ratios': ratios}
    (args.out / 'train_step.json').write_text(json.dumps(result, indent=1))
    draw(result, args.out / 'train_step.png')
    print(f'{args.out / "train_step.json"}, {args.out / "train_step.png"}')


if __name__ == '__main__':
    main()
