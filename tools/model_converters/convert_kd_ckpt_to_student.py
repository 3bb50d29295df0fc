"""Export a distillation's student to a file that plain mmpretrain loads strictly.

The file includes the names of the classes. A config that predicts image files is written next to it and, with --onnx,
the same network as ONNX.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import Tensor

from mmwsl.engine.console import quiet
from mmwsl.engine.export import (
    ExportError,
    build_strictly,
    config_in,
    inference_config,
    lines_to_predict,
    write_config,
    write_onnx,
)
from mmwsl.utils import read_weights, save_weights, student_weights
from mmwsl.utils.checkpoint import classes_in, read_meta


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint of WSLDistill, or of a MMRazor distillation')
    parser.add_argument(
        '--config', help="the distillation's config; default: the one that mmengine keeps in the checkpoint"
    )
    parser.add_argument('--out-path', help='the file to write; default: <checkpoint>_student.pth')
    parser.add_argument(
        '--inplace', action='store_true', help='overwrite the checkpoint; no run can be resumed from it afterwards'
    )
    parser.add_argument('--onnx', action='store_true', help='also write an ONNX file (mmwsl[onnx])')
    args = parser.parse_args(arguments)
    if args.inplace and args.out_path:
        parser.error('--inplace and --out-path exclude each other')
    return args


def read_student(checkpoint: str) -> dict[str, Tensor]:
    weights = read_weights(checkpoint, "Give a distillation's, such as work_dirs/<config>/epoch_100.pth")
    student = student_weights(weights)
    if not student:
        raise ValueError(
            f'{checkpoint} holds no student: none of its {len(weights)} keys begins with '
            f"'architecture.' (the first is {next(iter(weights))!r}). Is it a plain network already?"
        )
    return student


def config_of(args: argparse.Namespace, meta: Mapping[str, Any]) -> Config:
    cfg = Config.fromfile(args.config) if args.config else config_in(meta)
    if cfg is None:
        raise ExportError('there is no config in its checkpoint: give --config')
    return cfg


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    quiet(MMLogger.get_current_instance())
    student, meta = read_student(args.checkpoint), read_meta(args.checkpoint)
    classes = classes_in(meta)
    source = Path(args.checkpoint)
    target = source if args.inplace else Path(args.out_path or source.with_name(f'{source.stem}_student.pth'))
    try:
        cfg = inference_config(config_of(args, meta))
        network = build_strictly(cfg, student, classes, args.checkpoint)
    except ExportError as reason:
        if args.onnx:
            raise
        save_weights(student, str(target), classes)
        print(f'{len(student)} tensors of the student: {target}\nNo config that predicts was written: {reason}')
        return
    shape = write_onnx(network, cfg, classes, target.with_suffix('.onnx')) if args.onnx else None
    config = write_config(cfg, target)
    save_weights(student, str(target), classes)
    names = f' and the names of {len(classes)} classes' if classes else '; names of its classes are not known'
    print(f'{len(student)} tensors of the student{names}: {target}\nThe config that predicts with them: {config}')
    if shape:
        print(
            f'The same as ONNX, for RGB images (N, {", ".join(map(str, shape))}) from 0 to 255: '
            f'{target.with_suffix(".onnx")}'
        )
    print(f'In Python:\n\n{lines_to_predict(cfg, config, bool(classes))}', end='')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
