"""Distil a small network on real handwritten digits, against its controls: minutes on two cores, nothing downloaded.

Trains a teacher, then the same student alone, with plain soft labels and with weighted soft labels, several seeds each,
through tools/train.py and the configs of this repository. Prints a table and draws a picture.
"""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import os
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmwsl.engine.runs import scalars
from mmwsl.engine.runs import train as train_once

ROOT = Path(__file__).resolve().parent.parent
TEACHER = 'vanilla/digits_teacher'
ARMS = {
    'Student alone': 'vanilla/digits_student',
    'Plain soft labels (KD)': 'kd_digits',
    'Weighted soft labels (WSL)': 'wsl_digits',
}


def train(config: str, work_dir: Path, seed: int, *options: str) -> list[dict]:
    """Train a config and return its log, one dict per line."""
    if (work_dir / 'run.json').exists():  # an earlier demo's
        shutil.rmtree(work_dir)
    # these networks are so small that one thread each is fastest
    train_once(ROOT / 'tools/train.py', ROOT / f'configs/{config}.py', work_dir,
               [f'randomness.seed={seed}', *options], threads=1)
    return scalars(work_dir)


def accuracies(log: list[dict]) -> list[float]:
    return [line['accuracy/top1'] for line in log if 'accuracy/top1' in line]


def mean_weights(log: list[dict]) -> list[float]:
    return [line['distill.wsl_weight'] for line in log if 'distill.wsl_weight' in line]


def run_all(out: Path, seeds: int, jobs: int) -> tuple[float, dict[str, list[list[dict]]]]:
    """The teacher's accuracy, and the logs of each arm."""
    print('Training the teacher ...', flush=True)
    teacher = accuracies(train(TEACHER, out / 'teacher', 0))[-1]
    options = ('default_hooks.logger.interval=12', )  # once an epoch
    # relative, since mmengine drops white space from settings and splits them at commas
    checkpoint = f'model.teacher_ckpt={os.path.relpath(out / "teacher/epoch_30.pth")}'
    print(f'Training {len(ARMS)} x {seeds} students, {jobs} at a time ...', flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            arm: [pool.submit(train, config, out / f'{Path(config).name}_seed{seed}', seed, *options,
                              *([] if 'vanilla' in config else [checkpoint])) for seed in range(seeds)]
            for arm, config in ARMS.items()
        }
        return teacher, {arm: [run.result() for run in runs] for arm, runs in running.items()}


def print_table(teacher: float, logs: dict[str, list[list[dict]]]) -> None:
    print(f'\n{"top-1 on 1,197 test digits, %":30}   mean +- std   runs')
    print(f'{"Teacher":30} {teacher:6.2f}')
    for arm, runs in logs.items():
        last = [accuracies(log)[-1] for log in runs]
        spread = f'{statistics.stdev(last):5.2f}' if len(last) > 1 else '    -'
        print(f'{arm:30} {statistics.mean(last):6.2f} +- {spread}   {", ".join(f"{value:.2f}" for value in last)}')


def draw(teacher: float, logs: dict[str, list[list[dict]]], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for (arm, runs), style in zip(logs.items(), ('k:o', 'C0--s', 'C1-^'), strict=True):
        curves = [accuracies(log) for log in runs]
        epochs = range(1, len(curves[0]) + 1)
        left.plot(epochs, [statistics.mean(values) for values in zip(*curves, strict=True)], style, label=arm)
        left.fill_between(epochs, *zip(*((min(v), max(v)) for v in zip(*curves, strict=True)), strict=True),
                          color=style[:-2].rstrip('-:') or 'k', alpha=0.15)
    left.axhline(teacher, color='grey', label='Teacher')
    left.set(xlabel='epoch', ylabel='top-1 accuracy on the test set (%)', title=f'Mean and range, seeds: {len(curves)}')
    left.legend()
    for seed, log in enumerate(logs['Weighted soft labels (WSL)']):
        weights = mean_weights(log)
        right.plot(range(1, len(weights) + 1), weights, marker='.', label=f'seed {seed}')
    right.set(xlabel='epoch', ylabel='mean sample weight w', title='WSL: how far the soft labels are trusted',
              ylim=(0, 1.02))
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, help='runs of each arm')
    parser.add_argument('--jobs', type=int, default=min(4, os.cpu_count() or 1), help='runs at a time')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'))
    args = parser.parse_args()
    out = args.out.resolve()
    teacher, logs = run_all(out, args.seeds, args.jobs)
    print_table(teacher, logs)
    draw(teacher, logs, out / 'demo.png')
    print(f'\nPicture: {out / "demo.png"}')


if __name__ == '__main__':
    main()
