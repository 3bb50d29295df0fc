"""Test a checkpoint: of a distillation (its student), of a network alone, or of a config's teacher."""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel, is_model_wrapper

from mmwsl.analysis.predict import choose_network
from mmwsl.engine import (
    add_progress,
    console,
    explained_config,
    explained_data,
    finish_run,
    launcher_parser,
    merge_options,
    prepare_run,
    read_config,
)
from mmwsl.engine.data_checks import check_labels
from mmwsl.engine.hooks.check_labels_hook import predicted_classes
from mmwsl.utils import load_network


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = launcher_parser(__doc__)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; with --teacher, the default is teacher_ckpt')
    parser.add_argument('--teacher', action='store_true', help="test the config's teacher instead of its student")
    parser.add_argument(
        '--tta',
        action='store_true',
        help="average over transforms of each image: the config's "
        'tta_model and tta_pipeline, or mean class scores of the image and its mirror image',
    )
    parser.add_argument('--out', help='file for the results: .pkl, or .json for metrics')
    parser.add_argument('--out-item', choices=['metrics', 'pred'], help='what to write to --out; default: pred')
    parser.add_argument('--verbose', action='store_true', help="show mmengine's whole log, which is in its file, too")
    args = parser.parse_args(arguments)
    if args.out_item and not args.out:
        parser.error('--out-item needs --out')
    if args.out and args.out_item != 'metrics' and not args.out.endswith('.pkl'):
        parser.error(f'predictions need --out FILE.pkl, got {args.out}: for a .json file, add --out-item metrics')
    if not args.checkpoint and not args.teacher:
        parser.error('a checkpoint is needed, unless --teacher is given')
    return args


def choose_model(cfg: Config, args: argparse.Namespace) -> None:
    """Reduce the config to the network that is tested, so that no teacher is built to test its student."""
    if args.teacher and 'teacher' not in cfg.model:
        raise ValueError(f'{args.config} has no teacher: its model is a {cfg.model.type}')
    args.checkpoint = choose_network(cfg, 'teacher' if args.teacher else 'architecture', args.checkpoint)


@contextmanager
def around_the_network(cfg: Config, tta: bool) -> Iterator[None]:
    """Remove a config's wrapper for test-time augmentation in this context; then restore it or, for tta, add one."""
    model = None
    if 'module' in cfg.model:
        model, cfg.model = cfg.model, cfg.model.pop('module')
    yield
    if tta and model is None:
        set_tta_pipeline(cfg)
        model = cfg.get('tta_model') or dict(type='mmpretrain.AverageClsScoreTTA')
    if model is not None:
        cfg.model = ConfigDict(**model, module=cfg.model)
        cfg.data_preprocessor = None  # the network has it, and a TTA model would put the config's in its place


def set_tta_pipeline(cfg: Config) -> None:
    """Read each test image by the config's tta_pipeline or, without one, twice: as it is and mirrored.

    Raises:
        ValueError: If the images have been read already, and are kept on the device.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        if dataset.type == 'mmwsl.DeviceDataset':
            raise ValueError(
                '--tta transforms each image when it is read, but the images of a mmwsl.DeviceDataset are '
                'kept on the device. Give the dataset alone in test_dataloader, with collate_fn='
                "dict(type='default_collate')"
            )
        dataset = dataset.dataset
    *loading, packing = copy.deepcopy(dataset.pipeline)
    mirrored = dict(
        type='TestTimeAug', transforms=[[dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)], [packing]]
    )
    dataset.pipeline = cfg.get('tta_pipeline') or [*loading, mirrored]


def network_of(model: Any) -> Any:
    """Return the network inside wrappers for several processes and for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    if not args.verbose:
        console.quiet(MMLogger.get_current_instance())
    cfg = read_config(args.config)
    merge_options(cfg, args.cfg_options)  # before the model is chosen, since they may concern it
    args.cfg_options = None
    with around_the_network(cfg, args.tta):
        choose_model(cfg, args)
    cfg.load_from, cfg.resume = None, False  # how training began; mmengine would load it over the checkpoint
    if args.amp:
        cfg.test_cfg.fp16 = True
    prepare_run(cfg, args, ('test_dataloader',))
    add_progress(cfg)
    if not args.work_dir:  # mmengine writes the config there, without teacher, and must not replace the run's
        cfg.work_dir = f'{cfg.work_dir}/test'
    with explained_config():
        runner = console.build_runner(cfg, args.verbose)
        dataset = runner.test_loop.dataloader.dataset
    if args.checkpoint:
        load_network(network_of(runner.model), args.checkpoint)
    check_labels(dataset, predicted_classes(network_of(runner.model)), 'test_dataloader')
    if args.out and args.out_item != 'metrics':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    with explained_data(cfg, ('test_dataloader',)):
        metrics = runner.test()
    if args.out and args.out_item == 'metrics':
        mmengine.dump(metrics, args.out)
    finish_run()


if __name__ == '__main__':
    with console.one_screen('--verbose' in sys.argv):
        main()
