"""Get L_t from elsewhere than the live teacher: from a file with each training image's loss, or by a temperature.

    teacher_losses.py CONFIG [CKPT] --out FILE                    the teacher's losses, as it answers now
    teacher_losses.py --folds CONFIG CKPT0 CKPT1 ... --out FILE   each by the network that did not see the image's fold
    teacher_losses.py --folds CONFIG CKPT0 CKPT1 ... --calibrate  the temperature that fits what they did not see
    teacher_losses.py --fold K CONFIG [CKPT] --calibrate          the same of one network, trained without fold K

CONFIG is that of a network alone, or of a distillation, whose teacher is then used. The checkpoint of fold k is that of
a network trained with dict(type='mmwsl.Fold', fold=k, folds=..., dataset=...) around the training set. Nothing is
trained, and no test image is used: images are those of the training set, read by the validation pipeline.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse

import numpy as np
from mmengine.config import Config, DictAction

from mmwsl.engine import calibrate, check_data, measure_losses, merge_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoints', nargs='*', metavar='CKPT', help="default: the config's teacher_ckpt")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        default={},
        help='settings of CONFIG to override',
    )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        '--folds',
        action='store_true',
        help="the CKPTs are those of all folds, in order; the folds' number and seed are those of the config's "
        'mmwsl.Fold, otherwise the number of CKPTs and 0',
    )
    held_out.add_argument(
        '--fold',
        type=int,
        metavar='K',
        help="the fold of the config's mmwsl.Fold that CKPT was trained without, counted from 0",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument('--out', metavar='FILE', help='file for the losses, .npz')
    action.add_argument('--calibrate', action='store_true', help='fit a temperature to held-out images')
    args = parser.parse_intermixed_args()
    if args.folds != (len(args.checkpoints) > 1):
        parser.error(
            f'--folds and several checkpoints belong together, got {len(args.checkpoints)} '
            f'{"with" if args.folds else "without"} it'
        )
    if args.out and args.fold is not None:
        parser.error('--out needs a loss of every image, and --fold leaves all folds but one out: give --folds')
    if args.calibrate and not args.folds and args.fold is None:
        parser.error('--calibrate needs images that a network has not seen: give --folds, or --fold K')
    return args


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    merge_options(cfg, args.cfg_options)
    check_data(cfg, ('train_dataloader',))
    if args.calibrate:
        found = calibrate(cfg, args.checkpoints, args.fold)
        print(
            f'T = {found.tau:.4g} fits {found.images} held-out images best: their mean loss is {found.before:.4f} '
            f'without it and {found.after:.4f} with it.'
        )
        setting = f'teacher_tau={found.tau:.4g}'
    else:
        teacher, top1 = measure_losses(cfg, args.checkpoints, args.folds)
        teacher.save(args.out)
        losses = teacher.losses
        print(
            f'L_t of {len(losses)} images ({teacher.about["kind"]}): mean {losses.mean():.4g}, median '
            f'{np.median(losses):.4g}, {100 * top1:.2f} % top-1. In {args.out}.'
        )
        setting = f'teacher_losses={args.out!r}'
    print(f"For a config: weighting=dict(type='mmwsl.WSLWeighting', {setting})")


if __name__ == '__main__':
    main()
