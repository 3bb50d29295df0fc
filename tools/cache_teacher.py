"""Build a teacher cache: store a teacher's answers to V augmented views of its training set, for many runs to read.

The same command resumes a run that was killed. A finished cache is verified, and more views can be added to it.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed

from mmwsl.engine.cache_building import build_cache
from mmwsl.engine import explained_data, finish_run, launcher_parser, prepare_run


def parse_args() -> argparse.Namespace:
    parser = launcher_parser(__doc__)
    parser.add_argument('--views', type=int, required=True, help='augmented views of each image')
    parser.add_argument(
        '--out', help="the cache's folder; default: the config's teacher_cache, or <work dir>/teacher_cache"
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the views')
    parser.add_argument(
        '--top-k', type=int, metavar='K', help='keep the K largest logits and the mass of the others; default: keep all'
    )
    parser.add_argument('--dtype', choices=['float32', 'float16'], default='float32', help='type of the stored logits')
    parser.add_argument(
        '--taus',
        type=float,
        nargs='+',
        metavar='TAU',
        help="temperatures at which a top K can be restored; default: the losses'",
    )
    args = parser.parse_args()
    if args.views < 1:
        parser.error('--views should be at least 1')
    if args.amp:
        parser.error('a teacher is cached in full precision: leave --amp out')
    return args


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    prepare_run(cfg, args, ('train_dataloader',))
    if args.launcher != 'none' and not is_distributed():
        init_dist(args.launcher, **cfg.get('env_cfg', {}).get('dist_cfg', dict(backend='nccl')))
    out = args.out or cfg.model.get('teacher_cache') or Path(cfg.work_dir) / 'teacher_cache'
    with explained_data(cfg, ('train_dataloader',)):
        build_cache(cfg, out, args.views, args.seed, args.top_k, args.dtype, args.taus)
    finish_run()


if __name__ == '__main__':
    main()
