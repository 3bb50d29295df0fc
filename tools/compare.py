"""Compare a student alone, with plain and with weighted soft labels, or any configs: several seeds, one teacher.

Give the folder that tools/new_pair.py wrote, or several configs, or a single distillation, which is then compared with
its student alone and with plain soft labels. The teacher is trained first if the file in teacher_ckpt does not exist.
The same command resumes where it was stopped. Scores are those of the last epoch.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mmwsl.engine import runs
from mmwsl.engine.comparison import (
    CACHE,
    Metric,
    Plan,
    best_taught,
    draw,
    epochs_of,
    metric_of,
    on_validation_data,
    plan,
    table,
    train_all,
    warning,
    without_spaces,
)
from mmwsl.engine.gain import commands

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / 'tools/train.py'
tell = partial(print, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG', help='a config, or a folder of configs')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--jobs', type=int, help='runs at a time; default: 1 on a GPU, otherwise a core each, up to 4')
    parser.add_argument(
        '--views',
        type=int,
        metavar='V',
        help='run the teacher only once, on V views of each training image, and distil from its stored answers: KD and '
        'WSL are then about as fast as the student alone',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='settings of every run, as in tools/train.py'
    )
    parser.add_argument('--out', type=Path, help='folder for the runs; default: work_dirs/<name of the first CONFIG>')
    args = parser.parse_args()
    args.out = args.out or Path('work_dirs') / without_spaces(args.configs[0].resolve().stem)
    if str(args.out) != without_spaces(str(args.out)):
        parser.error(f'--out must not contain spaces or commas, at which settings of a run are split, got {args.out}')
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1))
    return args


def ask_teacher(tool: str, config: Path, options: Sequence[str], *arguments: str) -> None:
    """Run a tool on a distillation with its teacher; exit with the tool's error if it fails."""
    command = [
        sys.executable,
        '-W',
        'ignore',
        str(ROOT / 'tools' / tool),
        str(config),
        *arguments,
        *(['--cfg-options', *options] if options else []),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'tools/{tool} failed: {runs.ending(done.stdout)}')


def score_of_teacher(planned: Plan, metric: Metric, out: Path) -> float:
    """Return the score of the teacher's last epoch; test a teacher that is not trained here."""
    if planned.teacher_ckpt is None:
        return metric.scores(runs.scalars(planned.teacher.work_dir))[-1]
    found = out / 'teacher.json'
    ask_teacher(
        'test.py',
        *on_validation_data(planned.taught, planned.teaching, out),
        '--teacher',
        '--out',
        str(found),
        '--out-item',
        'metrics',
        '--work-dir',
        str(out / 'teacher_test'),
    )
    return metric.factor * json.loads(found.read_text())[metric.key]


def train(planned: Plan, args: argparse.Namespace) -> dict[str, list[list[dict]]]:
    """Train all that is not trained yet, and return the logs of each arm."""
    cores = os.cpu_count() or 1
    if planned.teacher_ckpt is None:
        tell(f'Training the teacher, {planned.teacher.config}, {epochs_of(planned.teacher.config)} epochs ...')
        train_all(TRAIN, [planned.teacher], 1, cores, tell)
    if args.views:
        tell(f'Storing the answers of the teacher for {args.views} views of each image ...')
        ask_teacher(
            'cache_teacher.py',
            planned.taught,
            planned.teaching,
            '--views',
            str(args.views),
            '--out',
            str(args.out / CACHE),
        )
    tell(
        f'Training {len(planned.arms)} x {len(args.seeds)} students, {args.jobs} at a time: '
        f'{", ".join(planned.arms)} ...'
    )
    students = [run for arm in planned.arms.values() for run in arm]
    logs = iter(train_all(TRAIN, students, args.jobs, max(1, cores // args.jobs), tell))
    return {arm: [next(logs) for _ in of_arm] for arm, of_arm in planned.arms.items()}


def main() -> None:
    args = parse_args()
    planned = plan(args.configs, args.out, args.seeds, args.cfg_options, bool(args.views))
    tell(f'Runs, logs and checkpoints are kept in {args.out}.')
    logs = train(planned, args)
    metric = metric_of(next(iter(logs.values()))[0])
    teacher = score_of_teacher(planned, metric, args.out)
    tell(f'\n{table(metric, teacher, logs)}\n{warning(metric, teacher, logs)}')
    draw(metric, teacher, logs, args.out / 'comparison.png')
    tell(f'Picture: {args.out / "comparison.png"}')
    best = best_taught(metric, planned, logs)
    for command in commands(best.config, best.last_checkpoint, taught=True)[1:]:
        tell(f'\nTo use a student, here the best that was taught:\n  {command}')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
