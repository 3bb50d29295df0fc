"""Test a checkpoint: of a distillation (its student), of a network alone, or of a config's teacher."""
import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse

import mmengine
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmwsl.analysis.predict import choose_network
from mmwsl.engine import finish_run, launcher_parser, merge_options, prepare_run
from mmwsl.utils import load_network


def parse_args() -> argparse.Namespace:
    parser = launcher_parser(__doc__)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; with --teacher, the default is teacher_ckpt')
    parser.add_argument('--teacher', action='store_true', help="test the config's teacher instead of its student")
    parser.add_argument('--out', help='file for the results: .pkl, or .json for metrics')
    parser.add_argument('--out-item', choices=['metrics', 'pred'], help='what --out takes; default: pred')
    args = parser.parse_args()
    if args.out_item and not args.out:
        parser.error('--out-item needs --out')
    if args.out and args.out_item != 'metrics' and not args.out.endswith('.pkl'):
        parser.error(f'predictions are written to a .pkl file, got --out {args.out}; --out-item metrics takes .json')
    if not args.checkpoint and not args.teacher:
        parser.error('a checkpoint is needed, unless --teacher is given')
    return args


def choose_model(cfg: Config, args: argparse.Namespace) -> None:
    """Leave in the config the one network that is tested: a teacher is not built to test its student."""
    if args.teacher and 'teacher' not in cfg.model:
        raise ValueError(f'{args.config} has no teacher: its model is a {cfg.model.type}')
    args.checkpoint = choose_network(cfg, 'teacher' if args.teacher else 'architecture', args.checkpoint)


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    merge_options(cfg, args.cfg_options)  # before the model is chosen, since they may concern it
    args.cfg_options = None
    choose_model(cfg, args)
    cfg.load_from, cfg.resume = None, False  # how training began; mmengine would load it over the checkpoint
    if args.amp:
        cfg.test_cfg.fp16 = True
    prepare_run(cfg, args, ('test_dataloader', ))
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.checkpoint:
        load_network(runner.model.module if is_model_wrapper(runner.model) else runner.model, args.checkpoint)
    if args.out and args.out_item != 'metrics':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out and args.out_item == 'metrics':
        mmengine.dump(metrics, args.out)
    finish_run()


if __name__ == '__main__':
    main()
