"""Take the student out of a distillation's checkpoint, as a file that plain mmpretrain loads strictly."""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
from pathlib import Path

from mmwsl.utils import read_weights, save_weights, student_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint of WSLDistill, or of a MMRazor distillation')
    parser.add_argument('--out-path', help='the file to write; default: <checkpoint>_student.pth')
    parser.add_argument('--inplace', action='store_true', help='replace the checkpoint itself; it cannot be resumed '
                        'from afterwards')
    args = parser.parse_args()
    if args.inplace and args.out_path:
        parser.error('--inplace and --out-path exclude each other')
    return args


def main() -> None:
    args = parse_args()
    weights = read_weights(args.checkpoint, "Give a distillation's, such as work_dirs/<config>/epoch_100.pth")
    student = student_weights(weights)
    if not student:
        raise ValueError(f"{args.checkpoint} holds no student: none of its {len(weights)} keys begins with "
                         f"'architecture.' (the first is {next(iter(weights))!r}). Is it a plain network already?")
    source = Path(args.checkpoint)
    target = source if args.inplace else Path(args.out_path or source.with_name(f'{source.stem}_student.pth'))
    save_weights(student, str(target))
    print(f'{len(student)} tensors of the student: {target}')


if __name__ == '__main__':
    main()
