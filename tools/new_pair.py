"""Write the configs of a teacher and a student for a folder of images: WSL, KD, and each network alone.

The folder has train/<class>/<image> and val/<class>/<image> (or valid, validation, test), or <class>/<image>, which is
then split. Nothing in it is changed. Networks have the names of configs/_base_/models, mmpretrain or timm.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import shlex
import sys
from pathlib import Path

from mmengine.logging import MMLogger

from mmwsl.datasets.image_folder import inspect_folder
from mmwsl.engine.comparison import without_spaces
from mmwsl.engine.console import quiet
from mmwsl.engine.named_networks import published_weights
from mmwsl.engine.new_pair import check_trained, get_network, pixels_for, recipe
from mmwsl.engine.pair_configs import write_pair

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='the folder of images')
    parser.add_argument('--teacher', required=True, metavar='NAME', help='e.g. resnet34, vit-base-p16, timm:resnet18')
    parser.add_argument('--student', required=True, metavar='NAME')
    parser.add_argument(
        '--teacher-ckpt',
        metavar='FILE',
        help='file of a teacher that knows these classes already; without it the teacher is trained first',
    )
    parser.add_argument(
        '--teacher-start',
        metavar='FILE',
        help='file or URL of weights, trained on other classes, from which the teacher starts',
    )
    parser.add_argument('--student-start', metavar='FILE', help='the same for the student')
    parser.add_argument(
        '--pixels',
        type=int,
        choices=[32, 224],
        help='size at which images are read; default: 32 if their shorter edges are up to 64 pixels, otherwise 224',
    )
    parser.add_argument(
        '--minutes',
        type=float,
        default=60,
        help='about how long the printed comparison may take on this machine: the teacher, and three seeds of '
        'student alone, KD and WSL; fewer minutes mean fewer epochs (default: %(default)g)',
    )
    parser.add_argument('--out', type=Path, help='folder for the configs; default: configs/<name of the data>')
    args = parser.parse_args()
    if args.teacher_ckpt and args.teacher_start:
        parser.error(
            '--teacher-ckpt (trained already) and --teacher-start (where training starts) exclude each other: give one'
        )
    for file in (args.teacher_ckpt, args.teacher_start, args.student_start):
        if file and '://' not in file and not Path(file).is_file():
            parser.error(f'there is no file {file}')
    args.out = args.out or Path('configs') / without_spaces(args.data.resolve().name)
    if str(args.out) != without_spaces(str(args.out)):
        parser.error(f'--out must not contain spaces or commas, at which settings of a run are split, got {args.out}')
    if (args.out / 'wsl.py').exists():
        parser.error(f'{args.out}/wsl.py exists already: choose another folder with --out, or delete it')
    return args


def address(teacher: str, pixels: int) -> str:
    """Return the address of a teacher's published weights, or a hint what to give instead."""
    known = published_weights(teacher) if pixels == 224 else None
    return known or 'FILE takes weights of the same network; docs/teachers.md lists some that others have published'


def main() -> None:
    args = parse_args()
    quiet(MMLogger.get_current_instance())
    folder = inspect_folder(args.data, tell=print)
    print(folder.describe())
    pixels, bases = args.pixels or pixels_for(folder), ROOT / 'configs/_base_/models'
    print(f'Trying {args.teacher} and {args.student} on {pixels} x {pixels} pixels ...', flush=True)
    teacher, student = (
        get_network(name, folder, pixels, bases, start)
        for name, start in ((args.teacher, args.teacher_start), (args.student, args.student_start))
    )
    if args.teacher_ckpt:
        check_trained(teacher, args.teacher_ckpt, folder.classes)
    made = recipe(folder, pixels, teacher, student, args.minutes, bool(args.teacher_ckpt))
    files = write_pair(args.out, ROOT / 'configs', folder, made, teacher, student, args.teacher_ckpt)
    print(made.describe())
    if not (args.teacher_ckpt or args.teacher_start):
        print(
            '  The teacher learns from these images alone, as its students do, and may end no better than they do. '
            f'Begin with one that has learnt from others:\n  --teacher-start {address(args.teacher, pixels)}'
        )
    print('Written: ' + ' '.join(str(file) for file in files))
    tools = shlex.quote(str(Path(sys.argv[0]).parent))
    print(f'\nLook at {args.out}/wsl.py, and then:')
    print(f'  python {tools}/compare.py {shlex.quote(str(args.out))} --seeds 0 1 2 --views {made.views}')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
