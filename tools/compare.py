"""Compare a student alone, with plain and with weighted soft labels, or any configs: several seeds, one teacher.

Give the folder that tools/new_pair.py wrote, a distillation alone, whose student alone and plain soft labels are then
compared with it, or several configs. The teacher is trained first if the file that teacher_ckpt names is not there.
The same command goes on where it was stopped. Figures are those of the last epoch.
"""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from mmwsl.engine.comparison import Metric, Plan, draw, metric_of, plan, table, train_all, warning

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / 'tools/train.py'
tell = partial(print, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG', help='a config, or a folder of configs')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--jobs', type=int, help='runs at a time; default: 1 on a GPU, otherwise a core each, up to 4')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for every run, as in '
                        'tools/train.py')
    parser.add_argument('--out', type=Path, help='folder for the runs; default: work_dirs/<name of the first CONFIG>')
    args = parser.parse_args()
    args.out = args.out or Path('work_dirs') / args.configs[0].resolve().stem
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1))
    return args


def score_of_teacher(planned: Plan, metric: Metric, options: list[str], out: Path) -> float:
    """Train the teacher, or test the one that is there."""
    if planned.teacher_ckpt is None:
        log, = train_all(TRAIN, [planned.teacher], 1, os.cpu_count() or 1, tell)
        return metric.scores(log)[-1]
    found = out / 'teacher.json'
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/test.py'), str(planned.taught), '--teacher', '--out',
               str(found), '--out-item', 'metrics', '--work-dir', str(out / 'teacher_test'),
               *(['--cfg-options', *options] if options else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'testing the teacher failed: {done.stdout.strip().splitlines()[-1]}')
    return metric.factor * json.loads(found.read_text())[metric.key]


def main() -> None:
    args = parse_args()
    planned = plan(args.configs, args.out, args.seeds, args.cfg_options)
    students = [run for arm in planned.arms.values() for run in arm]
    tell(f'Runs, logs and checkpoints are kept in {args.out}.')
    if planned.teacher_ckpt is None:
        tell(f'Training the teacher, {planned.teacher.config}, {planned.teacher.epochs} epochs ...')
        train_all(TRAIN, [planned.teacher], 1, os.cpu_count() or 1, tell)
    tell(f'Training {len(planned.arms)} x {len(args.seeds)} students, {args.jobs} at a time: '
         f'{", ".join(planned.arms)} ...')
    logs = train_all(TRAIN, students, args.jobs, max(1, (os.cpu_count() or 1) // args.jobs), tell)
    by_arm = {arm: [logs.pop(0) for _ in arms] for arm, arms in planned.arms.items()}
    metric = metric_of(next(iter(by_arm.values()))[0])
    teacher = score_of_teacher(planned, metric, args.cfg_options, args.out)
    tell(f'\n{table(metric, teacher, by_arm)}\n{warning(metric, teacher, by_arm)}')
    draw(metric, teacher, by_arm, args.out / 'comparison.png')
    tell(f'\nPicture: {args.out / "comparison.png"}')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
