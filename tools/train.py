"""Train a config: a student with its teacher, or a network alone."""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmwsl.engine import (
    add_hooks,
    choose_strategy,
    console,
    explained_config,
    explained_data,
    finish_run,
    latest_checkpoint,
    launcher_parser,
    prepare_run,
    prepare_strategy,
    read_config,
    sole_training,
)
from mmwsl.engine.strategies import CHOICES


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = launcher_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='resume from a checkpoint; without a value, from the latest in the work dir, if any',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size of all processes together',
    )
    parser.add_argument(
        '--strategy',
        choices=sorted(CHOICES),
        help='shard the student over the processes (docs/scale.md compares the strategies)',
    )
    parser.add_argument('--no-persistent-workers', action='store_true', help='start new workers for each epoch')
    parser.add_argument('--verbose', action='store_true', help="show mmengine's whole log, which is in its file, too")
    return parser.parse_args(arguments)


def apply_training_options(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options that only training has, in place."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.get('default_hooks', {}).get('checkpoint', {}).pop('save_best', None)  # there is nothing to choose by
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config: the batch '
                'size for which its learning rate was chosen'
            )
        cfg.auto_scale_lr.enable = True
    if args.strategy:
        choose_strategy(cfg, args.strategy)
    if args.no_persistent_workers:
        for field in ('train_dataloader', 'val_dataloader'):
            if cfg.get(field):
                cfg[field].persistent_workers = False


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    if not args.verbose:
        console.quiet(MMLogger.get_current_instance())
    cfg = read_config(args.config)
    apply_training_options(cfg, args)
    prepare_run(cfg, args, ('train_dataloader', 'val_dataloader'))
    prepare_strategy(cfg)
    add_hooks(cfg)
    with sole_training(cfg):
        if cfg.get('resume') and not cfg.get('load_from'):
            cfg.load_from = latest_checkpoint(cfg.work_dir)
        with explained_config():
            runner = console.build_runner(cfg, args.verbose)
        # data and optimisers are built here, too
        with explained_config(), explained_data(cfg, ('train_dataloader', 'val_dataloader')):
            runner.train()
    finish_run()


if __name__ == '__main__':
    with console.one_screen('--verbose' in sys.argv):
        main()
