"""Time a training step, ResNet-56 -> ResNet-20 on CIFAR-100: what do the teacher and the framework cost?

The arms of a group take turns, step by step, so that whatever else the machine does falls on all of them. All have the
same networks, images and batch size, and read their images in the same process. The images are random, of CIFAR-100's
size: what they show takes no time.

*plain*: a bare PyTorch loop over the student alone (the floor); the forward pass of the teacher, in eval mode and
without gradient; the student alone through mmengine's Runner; mmwsl with its teacher in eval mode, with batch
statistics, and cached; MMRazor's SingleTeacherDistill with WSLD, as it is and with mmwsl's ChannelsLastHook, which
all other arms through a Runner also have; timm's task of distillation (plain soft labels) in the bare loop.
*device*: the same with images kept on the device, and the loss by its Triton kernels.
*compiled*: the loss, the teacher and the whole forward pass by torch.compile.

Medians and ratios are printed and written to a JSON file, round by round, with the machine's description and the time
of each arm's first step, in which it compiles; all are drawn at the end. An arm that cannot run here is left out,
and the reason is printed.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import math
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import caption, describe
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.datasets import BaseDataset
from torch import Tensor, nn
from turns import Turns, reason_of

from mmwsl.engine.cache_building import build_cache
from mmwsl.utils import load_network, whole_file
from mmwsl.utils.pictures import pyplot

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {'vanilla': 'vanilla/r20_cifar100', 'cached': 'wsl_r56_r20_cifar100_cached'}
LAYOUT = dict(type='mmwsl.ChannelsLastHook', device_type=None)
GROUPS = {
    'plain': [
        'bare',
        'teacher',
        'vanilla',
        'wsl, eval',
        'wsl, batch statistics',
        'cached',
        'mmrazor',
        'mmrazor, channels last',
        'timm',
    ],
    'device': [
        'bare, device',
        'vanilla, device',
        'wsl, eval, device',
        'wsl, batch statistics, device',
        'wsl, triton, device',
        'mmrazor, device',
        'timm, device',
        'vanilla',
    ],
    'compiled': [
        'teacher',
        'vanilla',
        'wsl, eval',
        'wsl, eval, device',
        'wsl, loss compiled, device',
        'wsl, compiled, device',
        'wsl, every option',
        'wsl, every option, compiled, device',
    ],
}
RATIOS = [
    ('vanilla', 'bare'),
    ('vanilla, device', 'vanilla'),
    ('cached', 'vanilla'),
    ('wsl, eval', 'mmrazor'),
    ('wsl, eval', 'mmrazor, channels last'),
    ('wsl, every option', 'mmrazor'),
    ('wsl, batch statistics', 'mmrazor'),
    ('wsl, eval', 'timm'),
    ('vanilla, device', 'bare, device'),
    ('wsl, eval, device', 'vanilla, device'),
    ('wsl, eval, device', 'mmrazor, device'),
    ('wsl, eval, device', 'timm, device'),
    ('wsl, triton, device', 'wsl, eval, device'),
    ('wsl, loss compiled, device', 'wsl, eval, device'),
    ('wsl, compiled, device', 'wsl, eval, device'),
    ('wsl, every option, compiled, device', 'wsl, eval, device'),
]
LOSS = {'triton': 'triton', 'loss compiled': True}  # WSLLoss(compile=...)
WARM_UP = 5  # steps of each arm that are not counted


@DATASETS.register_module()
class RandomImages(BaseDataset):
    """Random images of CIFAR-100's size."""

    METAINFO = {'classes': tuple(map(str, range(100)))}

    def __init__(self, images: int, **kwargs: Any) -> None:
        self.number = images
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        drawn = np.random.default_rng(0)
        images = drawn.integers(0, 256, (self.number, 32, 32, 3), dtype=np.uint8)
        return [
            dict(img=image, gt_label=int(label))
            for image, label in zip(images, drawn.integers(0, 100, self.number), strict=True)
        ]


@HOOKS.register_module()
class TurnsHook(Hook):
    """Takes a turn for each step of the Runner: from the end of one iteration to that of the next, data included."""

    priority = 'LOWEST'
    turns: Turns  # set below: a config holds only data

    def __init__(self, arm: str) -> None:
        self.arm = arm

    def before_train_epoch(self, runner: Runner) -> None:
        self.turns.wait(self.arm)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        self.turns.done(self.arm)
        if batch_idx + 1 < len(runner.train_dataloader):
            self.turns.wait(self.arm)


def config_of(arm: str, steps: int, teacher: str, out: Path) -> Config:
    """Return an arm's config; its name holds its method and, after commas, what is changed about it."""
    method, *traits = arm.split(', ')
    cfg = Config.fromfile(ROOT / f'configs/{CONFIGS.get(method, "wsl_r56_r20_cifar100")}.py')
    prepare_data(cfg, 'device' in traits, steps)
    cfg.merge_from_dict(
        dict(
            work_dir=str(out / arm),
            experiment_name=f'{arm} {time.time()}',
            log_level='ERROR',
            train_cfg=dict(max_epochs=1),
            val_cfg=None,
            val_dataloader=None,
            val_evaluator=None,
            custom_hooks=[
                *([] if method == 'mmrazor' and 'channels last' not in traits else [LAYOUT]),
                dict(type='TurnsHook', arm=arm),
            ],
            randomness=dict(seed=0),
        )
    )
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1)
    cfg.compile = 'compiled' in traits
    if method != 'vanilla':
        teach(cfg, method, traits, teacher, out)
    return cfg


def prepare_data(cfg: Config, on_device: bool, steps: int) -> None:
    if on_device:
        base = Config.fromfile(ROOT / 'configs/_base_/datasets/cifar100_bs64_device.py')
        cfg.train_dataloader = base.train_dataloader
    loader = cfg.train_dataloader
    loader.update(num_batch_per_epoch=steps, num_workers=0, persistent_workers=False, pin_memory=False)
    loader.dataset.dataset = dict(
        type='RandomImages', images=steps * loader.batch_size, pipeline=loader.dataset.dataset.pipeline
    )


def teach(cfg: Config, method: str, traits: list[str], teacher: str, out: Path) -> None:
    cfg.model.teacher_ckpt = teacher
    cfg.model.teacher_norm_eval = 'batch statistics' not in traits
    if method == 'cached':
        cfg.model.teacher_cache = cfg.train_dataloader.dataset.cache = str(out / 'teacher_cache')
    if method == 'mmrazor':
        peer = Config.fromfile(ROOT / 'configs/mmrazor_r56_r20_cifar100_8e.py').model
        cfg.model.type, cfg.model.distiller = peer.type, peer.distiller
        return
    cfg.model.teacher_speed = 'compile_bf16' if 'every option' in traits else 'fold'
    cfg.model.distiller.distill_losses.loss_wsl.compile = next((LOSS[name] for name in traits if name in LOSS), False)


def runner_of(arm: str, *where: Any) -> Runner:
    if 'triton' in arm and not torch.cuda.is_available():
        raise RuntimeError('the kernels need a GPU')
    runner = Runner.from_cfg(config_of(arm, *where))
    runner.train_loop  # noqa: B018  reads its data now, while no other thread draws random numbers
    return runner


def script_of(arm: str, turns: Turns, steps: int, teacher: str) -> Callable[[], None]:
    """Return a loop that trains the student without a framework: alone, or by timm's task of distillation."""
    cfg = Config.fromfile(ROOT / 'configs/vanilla/r20_cifar100.py')
    prepare_data(cfg, 'device' in arm, steps)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    student = MODELS.build(cfg.model).to(device, memory_format=torch.channels_last)  # as LAYOUT
    loss_of = timm_task(student, teacher_of(teacher)) if arm.startswith('timm') else alone(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(cfg.data_preprocessor[key], device=device).view(3, 1, 1) for key in ('mean', 'std'))

    def run() -> None:
        batches = iter(loader)
        for _ in range(steps):
            turns.wait(arm)
            batch = next(batches)
            labels = torch.cat([sample.gt_label for sample in batch['data_samples']]).to(device)
            loss = loss_of((batch['inputs'].to(device).float() - mean) / std, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            turns.done(arm)

    return run


def alone(student: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    student.train()
    return lambda images, labels: nn.functional.cross_entropy(student(images), labels)


def timm_task(student: Any, teacher: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of timm's distillation, with soft labels of the same temperature and weight."""
    from timm.task import LogitDistillationTask

    for network in (student, teacher):  # what timm's own have; both see the same images
        network.pretrained_cfg = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        network.num_classes, network.in_chans = 100, 3
    teacher.to(memory_format=torch.channels_last).requires_grad_(False)
    task = LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=2.25,
        task_loss_weight=1.0,
        temperature=4.0,
        device=next(student.parameters()).device,
        verbose=False,
    )
    task.train()
    return lambda images, labels: task(images, labels)['loss']


def teacher_of(path: str) -> nn.Module:
    model = MODELS.build(Config.fromfile(ROOT / 'configs/vanilla/r56_cifar100.py').model)
    load_network(model, path)
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()


def teacher_loop(arm: str, turns: Turns, steps: int, path: str) -> Callable[[], None]:
    """Return a loop over the teacher's forward pass alone, for comparison."""
    model = teacher_of(path)
    inputs = torch.randn(64, 3, 32, 32, device=next(model.parameters()).device)

    def run() -> None:
        for _ in range(steps):
            turns.wait(arm)
            with torch.no_grad():
                model(inputs)
            turns.done(arm)

    return run


def built(arm: str, turns: Turns, steps: int, teacher: str, out: Path) -> Callable[[], object]:
    """Return the function that takes an arm's steps."""
    if arm == 'teacher':
        return teacher_loop(arm, turns, steps, teacher)
    if arm.startswith(('bare', 'timm')):
        return script_of(arm, turns, steps, teacher)
    if arm == 'cached':
        shutil.rmtree(out / 'teacher_cache', ignore_errors=True)
        build_cache(config_of(arm, steps, teacher, out), out / 'teacher_cache', views=1)
    return runner_of(arm, steps, teacher, out).train


def measure(arms: list[str], seconds: float, after_round: Callable[[dict], object], *where: Any) -> Turns:
    """Let the arms take their steps."""
    init_default_scope('mmpretrain')
    turns = TurnsHook.turns = Turns(arms, seconds, after_round)
    runs = {}
    for arm in arms:
        try:
            runs[arm] = built(arm, turns, *where)
        except Exception as error:
            turns.missing[arm] = reason_of(error)
            del turns.gates[arm]
    threads = [threading.Thread(target=turns.take_part, args=item) for item in runs.items()]
    for thread in threads:
        thread.start()
    turns.begin()
    for thread in threads:
        thread.join()
    return turns


def ratios_of(medians: dict[str, float]) -> dict[str, float]:
    """Return the ratios of the arms that were measured."""
    ratios = {
        f'{ours} / {theirs}': medians[ours] / medians[theirs]
        for ours, theirs in RATIOS
        if {ours, theirs} <= set(medians)
    }
    for arm in ('wsl, eval', 'wsl, every option'):
        if {arm, 'vanilla', 'teacher'} <= set(medians):
            ratios[f'({arm} - vanilla) / teacher'] = (medians[arm] - medians['vanilla']) / medians['teacher']
    return ratios


def draw(result: dict, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4), layout='constrained')
    arms, times = zip(*result['milliseconds'].items(), strict=True)
    bars = axes.barh(arms, times, color='0.8', edgecolor='black')
    axes.bar_label(bars, fmt='%.0f ms', padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel='median time of a step, milliseconds')
    axes.set_title(caption(result['machine']), fontsize='small')
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=20, help='steps of each arm in a round')
    parser.add_argument(
        '--rounds',
        type=int,
        default=4,
        help='each with new networks, whose place in memory alone can change a step by a tenth',
    )
    parser.add_argument('--groups', nargs='+', default=list(GROUPS), choices=GROUPS)
    parser.add_argument(
        '--seconds', type=float, default=math.inf, help='time limit for the steps of a group in a round'
    )
    parser.add_argument('--teacher', default='checkpoints/resnet56_cifar100.pth')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks'))
    return parser.parse_args()


class Result:
    """The measurements so far, kept on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, list[float]] = {}
        self.machine = describe('cuda' if torch.cuda.is_available() else 'cpu')
        self.first_steps: dict[str, float] = {}
        self.missing: dict[str, str] = {}

    def add(self, turns: Turns) -> None:
        for arm, times in turns.times.items():
            self.steps.setdefault(arm, []).extend(times[WARM_UP:])
            self.first_steps |= {arm: times[0]} if times and arm not in self.first_steps else {}
        self.missing |= turns.missing
        self.save({})

    def save(self, running: dict[str, list[float]]) -> dict:
        """Write the results, with the times of arms that are still taking steps."""
        steps = {arm: self.steps.get(arm, []) + running.get(arm, [])[WARM_UP:] for arm in {**self.steps, **running}}
        medians = {arm: statistics.median(times) for arm, times in steps.items() if times}
        first = {**{arm: times[0] for arm, times in running.items() if times}, **self.first_steps}
        result = {
            'machine': self.machine,
            'milliseconds': {arm: 1e3 * value for arm, value in medians.items()},
            'steps': {arm: len(steps[arm]) for arm in medians},
            'seconds of the first step': first,
            'missing': self.missing,
            'ratios': ratios_of(medians),
        }
        with whole_file(self.path) as file:
            file.write(json.dumps(result, indent=1).encode())
        return result


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    result = Result(args.out / 'train_step.json')
    for _ in range(args.rounds):
        for group in args.groups:
            result.add(measure(GROUPS[group], args.seconds, result.save, args.steps, args.teacher, args.out))
    found = result.save({})
    for arm, value in found['milliseconds'].items():
        print(f'{arm:40} {value:8.1f} ms')
    for name, value in found['ratios'].items():
        print(f'{name:60} {value:8.2f}')
    for arm, reason in found['missing'].items():
        print(f'left out: {arm} ({reason})')
    draw(found, args.out / 'train_step.png')
    print(f'{args.out / "train_step.json"}, {args.out / "train_step.png"}')


if __name__ == '__main__':
    main()
