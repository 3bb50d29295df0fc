"""Run what needs a GPU within a time limit, most valuable first: tests, benchmarks, a sweep.

The sweep is ResNet-56 -> ResNet-20 on CIFAR-100: alone, in the recipe of the field, with plain and with weighted soft
labels, three seeds each, all together; 40 epochs, or --epochs 240 for the paper's.

Each part is a process, and its results are under --out before the next one begins: tests.txt, loss.json, loss.png,
train_step.json, runs.jsonl (what the runs logged), log.txt (what everything else printed) and status.json (the card,
the versions and the state of each part). At the limit the part that runs is ended, and what it wrote stays. The same
command again resumes the runs from their last epoch. --parts tests loss=80 runs those alone, the loss for 80 seconds at
most.

Nothing is downloaded. With --wheels the stack is installed from a folder into the work dir, for a machine that has
torch and no network; nothing else is installed. --rehearse does the same at tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds in which a part has to end once it is told to
TICK = 5.0  # seconds between two looks at a part
EPOCHS = 40  # 12 runs of them took an H100 five minutes; all 240 of the paper's recipe take it half an hour
PARTS = ('tests', 'loss', 'step', 'runs')
WORKERS = 8  # processes that run the tests
TEACHER = 'chenyaofo_cifar100_resnet56.pth'
STACK = (
    'torch',
    'triton',
    'torchvision',
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmpretrain',
    'mmengine',
    'mmcv-lite',
    'mmpretrain',
    'mmrazor',
)


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    worth: float
    """The largest share of the limit that it may take, so that one that hangs leaves time to the others."""
    log: str = 'log.txt'
    """File under --out that gets its output."""
    needs: tuple[Path, ...] = ()
    """Files without which it is skipped."""
    collect: Callable[[], None] = lambda: None
    """Brings its results so far under --out; called every few seconds and at its end."""
    interrupted: bool = False
    """Whether it is ended as by Ctrl-C, after which pytest reports the failures so far."""


@dataclass
class Session:
    """Carries out parts one after the other, and keeps the state of each in ``status`` and on disk.

    Args:
        out: Folder for the results.
        limit: Seconds of all parts together.
        left: Returns how many of them are left.
        environment: Environment variables of the parts.
    """

    out: Path
    limit: float
    left: Callable[[], float]
    environment: dict[str, str]
    status: dict = field(default_factory=lambda: {'parts': []})

    def carry_out(self, part: Part) -> None:
        before, missing = self.left(), [str(path) for path in part.needs if not path.exists()]
        if missing or before <= 0:
            why = f'there is no {", ".join(missing)}' if missing else 'no time was left'
            self.status['parts'].append({'name': part.name, 'state': 'skipped', 'why': why})
            return self.save()
        record: dict[str, str | float] = {'name': part.name, 'state': 'running'}
        self.status['parts'].append(record)
        self.save()
        try:
            record['state'] = self.run(part, max(0.0, before - part.worth * self.limit))
        finally:
            if record['state'] == 'running':  # this process itself is being ended
                record['state'] = 'cut off'
            part.collect()
            record['seconds'] = round(before - self.left(), 1)
            self.save()

    def run(self, part: Part, until: float) -> str:
        """Run a part while more than ``until`` seconds are left; return its state."""
        with (self.out / part.log).open('ab') as log:
            log.write(f'==== {part.name}: {shlex.join(part.command)}\n'.encode())
            log.flush()
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )
            try:
                while process.poll() is None and (left := self.left() - until) > 0:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(min(TICK, left))
                    part.collect()
                return {None: 'cut off', 0: 'finished'}.get(process.poll(), 'failed')
            finally:
                end(process, part.interrupted)

    def save(self) -> None:
        write_whole(self.out / 'status.json', json.dumps(self.status, indent=1))


def hear_interrupts() -> None:
    """Let a process react to SIGINT, which a shell makes its background jobs ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end(process: subprocess.Popen, interrupted: bool) -> None:
    """End a process that is still running, and all that it started."""
    if process.poll() is not None:
        return
    if interrupted:
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f'{path.name}.partial')
    unfinished.write_text(text)
    os.replace(unfinished, path)


def parts_of(args: argparse.Namespace) -> list[Part]:
    """Return the parts to run, most valuable first."""
    teacher, chosen = args.teachers / TEACHER, dict(args.parts)
    parts = [
        cuda_tests(args),
        loss_benchmark(args),
        Part(
            'teacher',
            python('tools/model_converters/import_teacher.py', str(teacher), str(imported_teacher(args))),
            worth=0.1,
            needs=(teacher,),
        ),
        step_benchmark(args),
        sweep(args),
    ]
    if {'step', 'runs'} & set(chosen):
        chosen = {'teacher': None, **chosen}
    return [
        *([installation(args)] if args.wheels else []),
        *(
            replace(part, worth=(chosen[part.name] or part.worth * args.seconds) / args.seconds)
            for part in parts
            if part.name in chosen
        ),
    ]


def installation(args: argparse.Namespace) -> Part:
    files = sorted(map(str, args.wheels.glob('*.whl')))
    return Part(
        'wheels',
        [
            *python('-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', '--no-index'),
            '--no-deps',
            '--target',
            str(site(args)),
            *files,
        ],
        worth=0.3,
    )


def cuda_tests(args: argparse.Namespace) -> Part:
    """Return the tests that run on a GPU, from the files that have some: others would be collected for nothing."""
    files = [path for path in sorted((ROOT / 'tests').rglob('test_*.py')) if 'cuda' in path.read_text()]
    workers = [f'--numprocesses={WORKERS}'] if find_spec('xdist') else []
    if args.rehearse:
        files, workers = [ROOT / 'tests/test_models/test_losses/test_wsl_loss.py'], []  # which skips its GPU tests
    return Part(
        'tests',
        [
            *python(
                '-m',
                'pytest',
                '-k',
                'cuda',
                '-m',
                'not slow',
                '-p',
                'no:cacheprovider',
                '--continue-on-collection-errors',
                '--verbose',
                '--tb=short',
                '-rfE',
            ),
            *workers,
            *(str(path.relative_to(ROOT)) for path in files),
        ],
        worth=0.4,
        log='tests.txt',
        interrupted=True,
    )


def loss_benchmark(args: argparse.Namespace) -> Part:
    # each row compiles kernels: about 20 seconds
    sizes = [
        '--device',
        'cuda',
        '--seconds',
        '0.2',
        '--rounds',
        '20',
        '--shapes',
        '256x1000',
        '16384x1000',
        '8x150x512x512',
        '64x100',
        '8x19x128x128',
    ]
    if args.rehearse:
        kernel = ['WSLLoss triton'] if find_spec('triton') else []  # without a GPU it is the same as WSLLoss
        sizes = ['--shapes', '8x10', '--contestants', 'WSLLoss', 'plain KD', *kernel, '--rounds', '3', '--seconds', '0']
    return Part(
        'loss',
        [
            *python('tools/benchmarks/loss.py'),
            '--out',
            str(args.out),
            '--processes',
            '0',
            '--dtype',
            'float32',
            'bfloat16',
            *sizes,
        ],
        worth=0.4,
    )


def step_benchmark(args: argparse.Namespace) -> Part:
    """Return the benchmark of a training step: kinds of teachers, images on the device, compiled, MMRazor, timm."""
    out, sizes = args.work / 'step', ['--steps', '60', '--seconds', '60']
    if args.rehearse:
        sizes = ['--steps', '7', '--groups', 'plain', 'device']  # the first five are not counted
    where = ['--teacher', str(imported_teacher(args)), '--out', str(out)]
    return Part(
        'step',
        [*python('tools/benchmarks/train_step.py'), '--rounds', '1', *sizes, *where],
        worth=0.35,
        needs=(args.teachers / TEACHER,),
        collect=partial(collect_steps, out, args.out),
    )


def collect_steps(work: Path, out: Path) -> None:
    """Copy the benchmark's figures, but neither its teacher cache nor its runs."""
    if (work / 'train_step.json').exists():
        write_whole(out / 'train_step.json', (work / 'train_step.json').read_text())


def sweep(args: argparse.Namespace) -> Part:
    """Return the paper's recipe in ``--epochs`` of its 240; a rehearsal has 200 images, or the digits without CIFAR."""
    needs: tuple[Path, ...] = (args.data / 'cifar-100-python/train', args.teachers / TEACHER)
    configs = [ROOT / 'configs/vanilla/r20_cifar100.py', *taught(args)]
    datasets = ('train_dataloader.dataset.dataset', 'val_dataloader.dataset')
    options = [f'{key}.data_root={args.data}' for key in datasets]
    milestones = [args.epochs * eighths // 8 for eighths in (5, 6, 7)]  # as 150, 180 and 210 of 240
    settings, seeds = [f'train_cfg.max_epochs={args.epochs}', f'param_scheduler.milestones={milestones}'], [0, 1, 2]
    if not args.rehearse:
        options += ['optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.dtype=bfloat16', 'train_cfg.val_interval=4']
    else:
        options += [f'{key}.indices=200' for key in datasets]
        settings, seeds = ['train_cfg.max_epochs=1'], [0]
        if not all(path.exists() for path in needs):
            configs, options, needs = [ROOT / 'configs/vanilla/digits_student.py'], ['train_cfg.val_interval=1'], ()
    return Part(
        'runs',
        [
            *python('tools/sweep.py', *map(str, configs)),
            '--together',
            '--seeds',
            *map(str, seeds),
            *(word for setting in settings for word in ('--set', setting.replace(' ', ''))),
            '--work-dir',
            str(args.work / 'sweep'),
            '--results',
            str(args.work / 'results'),
            '--cfg-options',
            *options,
        ],
        worth=1.0,
        needs=needs,
        collect=partial(collect_runs, args.work / 'sweep', args.out),
    )


def taught(args: argparse.Namespace) -> list[Path]:
    """Write configs of the field's recipe, plain and weighted soft labels, with the imported teacher."""
    paths = []
    for name in ('kd-hinton', 'kd', 'wsl'):
        paths.append(args.work / f'configs/{name}_r56_r20_cifar100.py')
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            paths[-1],
            f'_base_ = [{str(ROOT / "configs" / paths[-1].name)!r}]\n'
            f'model = dict(teacher_ckpt={str(imported_teacher(args))!r})\n',
        )
    return paths


def collect_runs(work: Path, out: Path) -> None:
    """Write what all runs logged so far into one file, each line with the name of its run."""
    lines = []
    for log in sorted(work.glob('*/*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the last one may still be being written
                lines.append(json.dumps({'run': log.relative_to(work).parts[0], **json.loads(line)}))
    write_whole(out / 'runs.jsonl', ''.join(f'{line}\n' for line in lines))


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def site(args: argparse.Namespace) -> Path:
    return args.work / 'site'


def imported_teacher(args: argparse.Namespace) -> Path:
    return args.work / 'resnet56_cifar100.pth'


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), *([str(site(args))] if args.wheels else []), *filter(None, [os.environ.get('PYTHONPATH')])]
    # unbuffered, or a part that is cut off would take its last lines with it
    added = {'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1'}
    return {**os.environ, **added, **({'CUDA_VISIBLE_DEVICES': ''} if args.rehearse else {})}


def card() -> str:
    """Return the name of the GPU.

    Raises:
        SystemExit: If torch sees none.
    """
    code = 'import torch; print(torch.cuda.get_device_name())'
    asked = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise SystemExit(
            f'torch sees no GPU here ({asked.stderr.strip().splitlines()[-1]}). --rehearse (make gpu '
            'REHEARSE=1) does the same at tiny sizes on the CPU'
        )
    return asked.stdout.strip()


def versions(args: argparse.Namespace) -> dict[str, str]:
    found = {package.name: package.version for package in distributions(path=[str(site(args)), *sys.path])}
    return {'python': sys.version.split()[0], **{name: found[name] for name in STACK if name in found}}


def part_named(text: str) -> tuple[str, float | None]:
    name, _, seconds = text.partition('=')
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f'{name!r} is none of {", ".join(PARTS)}')
    return name, float(seconds) if seconds else None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=540, help='the limit, from the start of this program')
    parser.add_argument(
        '--parts',
        nargs='+',
        type=part_named,
        default=[(name, None) for name in PARTS],
        metavar='PART',
        help=f'one of {", ".join(PARTS)}; default: all. PART=SECONDS limits its time',
    )
    parser.add_argument(
        '--epochs', type=int, default=EPOCHS, help=f"of the runs, {EPOCHS} if not given; 240 are the paper's"
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu/results'), help='folder for the results')
    parser.add_argument('--work', type=Path, help='folder for everything else; default: work_dirs/gpu')
    parser.add_argument('--data', type=Path, default=Path('data/cifar100'), help='folder with cifar-100-python')
    parser.add_argument('--teachers', type=Path, default=Path('checkpoints'), help=f'folder with {TEACHER}')
    parser.add_argument('--wheels', type=Path, help='folder with the wheels of the stack')
    parser.add_argument('--rehearse', action='store_true', help='tiny sizes on the CPU')
    args = parser.parse_args()
    args.work = args.work or ROOT / 'work_dirs' / ('gpu_rehearsal' if args.rehearse else 'gpu')
    for name in ('out', 'work', 'data', 'teachers', 'wheels'):  # parts run in the root of the tree
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    return args


def main() -> None:
    args, started = parse_args(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    limit = args.seconds - GRACE
    session = Session(args.out, limit, lambda: limit - (time.monotonic() - started), environment_of(args))
    session.status = {
        'card': 'none, a rehearsal' if args.rehearse else card(),
        'seconds': args.seconds,
        'versions': versions(args),
        'parts': [],
    }
    for part in parts_of(args):
        session.carry_out(part)
        print(' '.join(map(str, session.status['parts'][-1].values())), flush=True)
    session.status['versions'] = versions(args)  # the wheels' are there now
    session.save()
    sys.exit(any(part['state'] == 'failed' for part in session.status['parts']))


if __name__ == '__main__':
    main()
