"""Distil a small network on real handwritten digits, and compare it with its controls: minutes on two cores.

Trains a teacher, then the same student alone, with plain soft labels and with weighted soft labels, several seeds each,
through tools/train.py and the configs of this repository. Prints a table and draws a picture. Nothing is downloaded.
--task seg, multi and det do the same on scenes of digits: a class for each pixel, several labels for an image, boxes.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import os
import shutil
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, FUNCTIONS, MODELS, init_default_scope

from mmwsl.engine import copies
from mmwsl.engine.comparison import ALONE, PLAIN, WEIGHTED, Metric, Trained, draw, table, train_all
from mmwsl.utils.checkpoint import load_network
from mmwsl.utils.pictures import pyplot

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / 'tools/train.py'
THREADS = 1  # these networks are so small that one thread each is fastest
SHOWN = 3  # scenes in the picture
tell = partial(print, flush=True)


@dataclass(frozen=True)
class Task:
    """What a demo trains, and how it is scored."""

    teacher: str
    arms: dict[str, str]
    metric: Metric
    seeds: int
    package: str = ''
    """A package of the extra ``dense`` that it needs."""


TASKS = {
    'cls': Task(
        'vanilla/digits_teacher',
        {ALONE: 'vanilla/digits_student', PLAIN: 'kd_digits', WEIGHTED: 'wsl_digits'},
        Metric('accuracy/top1', 'top-1 on 1,197 test digits, %'),
        5,
    ),
    'seg': Task(
        'seg/teacher_digits-seg',
        {
            ALONE: 'seg/student_digits-seg',
            PLAIN: 'seg/kd_digits-seg',
            WEIGHTED: 'seg/wsl_digits-seg',
        },
        Metric('mIoU', 'mIoU on 300 test scenes, %'),
        3,
        package='mmseg',
    ),
    'multi': Task(
        'multi/teacher_digits-multi',
        {ALONE: 'multi/student_digits-multi', PLAIN: 'multi/kd_digits-multi', WEIGHTED: 'multi/wsl_digits-multi'},
        Metric('multi-label/mAP', 'mAP on 300 test scenes, %'),
        3,
    ),
    'det': Task(
        'det/teacher_digits-det',
        {
            ALONE: 'det/student_digits-det',
            PLAIN: 'det/kd_digits-det',
            WEIGHTED: 'det/wsl_digits-det',
            'WSL without |p_s - p_t|': 'det/wsl-plain_digits-det',
        },
        Metric('coco/bbox_mAP', 'mAP on 300 test scenes, %', 100.0),
        3,
        package='mmdet',
    ),
}


def run_all(task: Task, out: Path, seeds: int, jobs: int) -> tuple[float, dict[str, list[list[dict]]]]:
    """Train the teacher and all arms; return the teacher's score, and the logs of each arm."""
    for record in out.glob('*/run.json'):  # an earlier demo's
        shutil.rmtree(record.parent)
    print('Training the teacher ...', flush=True)
    teacher = Trained(path_of(task.teacher), out / 'teacher', ('randomness.seed=0',))
    (log,) = train_all(TRAIN, [teacher], 1, THREADS, tell)
    # on the digits a line an epoch; a checkpoint takes as long as twenty of these steps
    options = ('default_hooks.logger.interval=12', 'default_hooks.checkpoint.interval=5')
    # relative, since mmengine drops white space from settings and splits them at commas
    checkpoint = f'model.teacher_ckpt={os.path.relpath(teacher.last_checkpoint)}'
    print(f'Training {len(task.arms)} x {seeds} students, {jobs} at a time ...', flush=True)
    planned = [
        Trained(
            path_of(config),
            work_dir_of(config, seed, out),
            (f'randomness.seed={seed}', *options, *([] if arm == ALONE else [checkpoint])),
        )
        for arm, config in task.arms.items()
        for seed in range(seeds)
    ]
    logs = iter(train_all(TRAIN, planned, jobs, THREADS, tell))
    return task.metric.scores(log)[-1], {arm: [next(logs) for _ in range(seeds)] for arm in task.arms}


def path_of(config: str) -> Path:
    return ROOT / f'configs/{config}.py'


def work_dir_of(config: str, seed: int, out: Path) -> Path:
    return out / f'{Path(config).name}_seed{seed}'


def last_checkpoint(config: str, work_dir: Path) -> Path:
    return Trained(path_of(config), work_dir, ()).last_checkpoint


def draw_scenes(task: Task, out: Path, path: Path) -> None:
    """Draw some test scenes: what is in them, and what the teacher and each arm of seed 0 find there."""
    plt = pyplot()
    MMLogger.get_current_instance().setLevel('WARNING')  # no line for each checkpoint
    found = {'Teacher': predicted(task.teacher, last_checkpoint(task.teacher, out / 'teacher'))}
    for arm, config in task.arms.items():  # a student is the same network, whoever taught it
        found[arm] = predicted(task.arms[ALONE], last_checkpoint(config, work_dir_of(config, 0, out)))
    figure, axes = plt.subplots(SHOWN, len(found) + 1, figsize=(2 * len(found) + 2, 2.3 * SHOWN), layout='constrained')
    for row, scene in zip(axes, next(iter(found.values())), strict=True):
        show(row[0], scene, 'gt_', 'In the scene')
    for place, (name, scenes) in enumerate(found.items(), 1):
        for row, scene in zip(axes, scenes, strict=True):
            show(row[place], scene, 'pred_', name)
    figure.savefig(path, dpi=120)


def predicted(config: str, checkpoint: Path) -> list[tuple[Any, Any]]:
    """Return the first test scenes, as images of shape (H, W), with the predictions of a config's network."""
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    model = MODELS.build({'data_preprocessor': cfg.data_preprocessor, **cfg.model})
    load_network(model, str(checkpoint))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    items = [dataset[i] for i in range(SHOWN)]
    collate = FUNCTIONS.get(cfg.val_dataloader.collate_fn.type)
    model.eval()
    return [
        (item['inputs'].float().mean(0), sample)
        for item, sample in zip(items, model.test_step(collate(items)), strict=True)
    ]


def show(ax: Any, scene: tuple[Any, Any], side: str, title: str) -> None:
    """Draw one scene with its classes: as a map over the image, as boxes, or in words under it."""
    image, sample = scene
    ax.imshow(image, cmap='gray')
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize='small')
    if f'{side}sem_seg' in sample:
        ax.imshow(
            sample.get(f'{side}sem_seg').data[0], cmap='tab20', vmin=0, vmax=19, alpha=0.75, interpolation='nearest'
        )
    elif f'{side}instances' in sample:
        found = sample.get(f'{side}instances')
        sure = found[found.scores > 0.3] if 'scores' in found else found
        for (left, top, right, bottom), label in zip(sure.bboxes.tolist(), sure.labels.tolist(), strict=True):
            ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=f'C{label}', linewidth=1)
            ax.text(left, top, str(label), color=f'C{label}', fontsize='x-small', verticalalignment='bottom')
        height, width = image.shape
        ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))  # boxes may reach beyond it
    else:
        ax.set_xlabel(
            ' '.join(str(label) for label in sorted(sample.get(f'{side}label').tolist())) or 'none', fontsize='small'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--task',
        choices=TASKS,
        default='cls',
        help='cls: single digits; the others: scenes of digits. seg and det need the extra dense',
    )
    parser.add_argument('--seeds', type=int, help='runs of each arm; default: 5 for cls, 3 for the others')
    parser.add_argument('--jobs', type=int, default=min(4, os.cpu_count() or 1), help='runs at a time')
    parser.add_argument('--out', type=Path, help='default: work_dirs/demo, or work_dirs/demo_TASK')
    args = parser.parse_args()
    task = TASKS[args.task]
    if task.package and find_spec(task.package) is None:
        parser.error(f'--task {args.task} needs {task.package}: run make install DENSE=1, or install the extra dense')
    out = (args.out or Path('work_dirs/demo' if args.task == 'cls' else f'work_dirs/demo_{args.task}')).resolve()
    teacher, logs = run_all(task, out, args.seeds or task.seeds, args.jobs)
    print('\n' + table(task.metric, teacher, logs))
    draw(task.metric, teacher, logs, out / 'demo.png')
    pictures = [out / 'demo.png']
    if args.task != 'cls':
        draw_scenes(task, out, out / 'scenes.png')
        pictures.append(out / 'scenes.png')
    print(f'\nProcessor time: {(sum(os.times()[:4]) + copies.processor_time()) / 60:.1f} minutes')
    print(*(f'Picture: {path}' for path in pictures), sep='\n')


if __name__ == '__main__':
    main()
