"""Common parts of tools/train.py and tools/test.py: options, config, hooks, and the lock of a work dir."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.logging import print_log

from mmwsl.compat import distribute_without_cuda, import_quietly
from mmwsl.engine.config_checks import check_static_graph, merge_options, warn_of_schedule, warn_of_unread_keys
from mmwsl.engine.data_checks import check_data, is_first_process
from mmwsl.utils.data import collate_for, set_dataloader_defaults
from mmwsl.utils.files import lock

_DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def launcher_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, or one of an installed package (mmrazor::distill/mmcls/...)')
    parser.add_argument('--work-dir', help='where logs and checkpoints go; default: work_dirs/<name of the config>')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        type=_setting,
        metavar='KEY=VALUE',
        help='config settings to override, e.g. optim_wrapper.optimizer.lr=0.01; write a list as '
        'key="[a,b]", without spaces',
    )
    parser.add_argument('--no-pin-memory', action='store_true', help='do not use pinned memory in the dataloaders')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes one of the two, depending on its version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(path: str) -> Config:
    """Read a config: a file, or one that comes with an installed package (``mmrazor::distill/mmcls/kd/....py``).

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the package is not installed.
        ValueError: If it, or a config that it reads, is not Python.
    """
    package, separator, _ = path.partition('::')
    if not separator and not Path(path).exists():
        close = difflib.get_close_matches(path, map(str, Path(path).parent.glob('*.*')), n=1)
        raise FileNotFoundError(
            f'there is no config {path}. '
            + (f'Did you mean {close[0]}?' if close else 'configs/README.md lists those of this project')
        )
    if separator and importlib.util.find_spec(package) is None:  # mmengine would install it
        raise ModuleNotFoundError(
            f'{path} is a config of {package}, which is not installed. Install it, or give a config file'
        )
    try:
        cfg = get_config(path) if separator else Config.fromfile(path)
    except SyntaxError as error:
        line = (error.text or '').strip()
        raise ValueError(
            f'{path}, or a config that it reads, is not Python: {error.msg} (line {error.lineno}: {line}). '
            'Correct this line, or the one above it'
        ) from error
    for package in ('mmdet', 'mmseg'):  # a registry would import them later, and print warnings about themselves
        if package in f'{cfg.get("default_scope")} {cfg.get("model")}' and importlib.util.find_spec(package):
            import_quietly(f'{package}.datasets')
    return cfg


def _setting(text: str) -> str:
    if re.search(r'[^\s,(\[]\s+[^\s,)\]]', text):
        raise argparse.ArgumentTypeError(
            f'mmengine drops the spaces within a setting, got {text!r}: put it into a config file'
        )
    return text


def prepare_run(cfg: Config, args: argparse.Namespace, dataloaders: tuple[str, ...] = _DATALOADERS) -> None:
    """Apply the common options to a config, and check what can be checked before anything is built.

    Args:
        cfg: The config, changed in place.
        args: From :func:`launcher_parser`.
        dataloaders: Names of the dataloaders whose data must exist.

    Raises:
        FileNotFoundError: If data are missing; the message names the expected folder and its layout.
        ValueError: If mixed precision is requested without a GPU, nothing would read an option, or
            DistributedDataParallel cannot do what the config requests.
    """
    # mmengine reads LOCAL_RANK, which Open MPI calls something else
    os.environ.setdefault('LOCAL_RANK', os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', str(args.local_rank)))
    cfg.launcher = args.launcher
    if args.work_dir or not cfg.get('work_dir'):
        cfg.work_dir = args.work_dir or f'work_dirs/{Path(args.config).stem}'
    merge_options(cfg, args.cfg_options)
    warn_of_unread_keys(cfg)
    warn_of_schedule(cfg)
    for field in _DATALOADERS:
        if cfg.get(field):
            set_dataloader_defaults(cfg[field], not args.no_pin_memory, collate_for(cfg))
    if args.amp and not torch.cuda.is_available():
        raise ValueError('--amp needs a GPU, and torch finds none. Leave it out to train in float32')
    check_static_graph(cfg)
    check_data(cfg, dataloaders)
    distribute_without_cuda(cfg)


def add_hooks(cfg: Config) -> None:
    """Add the hooks that every training should have; a hook that the config has already is not added again.

    With them a run resumes exactly and only from its own checkpoints, saves one when it is told to end, refuses labels
    outside the classes, stops when it diverges, reads from a GPU only what is logged, keeps its best checkpoint, and
    shows its progress and what it gained. A distillation also computes only the statistics that are logged, and warns
    if its student learns nothing from the labels.
    """
    cfg.default_hooks = {'runtime_info': dict(type='mmwsl.LateScalarsHook'), **(cfg.get('default_hooks') or {})}
    _keep_best(cfg)
    hooks = list(cfg.get('custom_hooks') or [])
    looks_at_labels = any('CheckTeacherHook' in str(hook['type']) for hook in hooks)
    of_teachers = ['LossStatisticsHook', 'HardLossHook'] if cfg.model.get('distiller') else []
    wanted = [
        *([] if looks_at_labels else ['CheckLabelsHook']),
        'CheckResumeHook',
        'StopOnSignalHook',
        'ExactResumeHook',
        'FiniteLossHook',
        'RunReportHook',
        'ProgressHook',
        *of_teachers,
    ]
    cfg.custom_hooks = [
        *hooks,
        *(dict(type=f'mmwsl.{name}') for name in wanted if not any(name in str(hook['type']) for hook in hooks)),
    ]


def add_progress(cfg: Config) -> None:
    """Add the hook that shows a test's progress, unless the config has it already, as one dumped by a run does."""
    hooks = cfg.get('custom_hooks') or []
    if not any('ProgressHook' in str(hook['type']) for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mmwsl.ProgressHook')]


def _keep_best(cfg: Config) -> None:
    """Let the best checkpoint be kept, too, unless the config states which ones to keep."""
    checkpoint = cfg.default_hooks.get('checkpoint')
    if (
        cfg.get('val_evaluator')
        and checkpoint
        and checkpoint.get('type') == 'CheckpointHook'
        and 'save_best' not in checkpoint
        and checkpoint.get('interval', -1) > 0
    ):
        checkpoint['type'] = 'mmwsl.BestCheckpointHook'


@contextmanager
def sole_training(cfg: Config) -> Iterator[None]:
    """Lock a config's work dir against other trainings until this one ends or is killed.

    The first process of a run locks the file ``training.lock`` there; the kernel releases it even after a kill. If the
    storage does not support locks, a warning is logged.

    Raises:
        RuntimeError: If another training runs there; the message names its process, host and start.
    """
    if cfg.launcher != 'none' and not is_first_process():
        yield
        return
    path = Path(cfg.work_dir) / 'training.lock'
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666), 'r+') as stream:
        try:
            lock(
                stream,
                f'another training runs in {cfg.work_dir}{_holder(path)}, and this one would overwrite its '
                'files (--work-dir chooses another folder)',
            )
        except OSError as error:
            print_log(
                f'{path} cannot be locked ({error}): a second training in {cfg.work_dir} would go unnoticed.',
                'current',
                logging.WARNING,
            )
        stream.truncate(0)
        json.dump(dict(process=os.getpid(), host=platform.node(), since=f'{datetime.now():%Y-%m-%d %H:%M:%S}'), stream)
        stream.flush()
        if hasattr(os, 'register_at_fork'):  # workers that outlive a killed run for seconds must not hold the lock
            os.register_at_fork(after_in_child=stream.close)
        yield


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f' (process {found["process"]} on {found["host"]}, since {found["since"]})'
    except (OSError, ValueError, LookupError, TypeError):  # not written yet; on Windows nobody else can read it
        return ''


def finish_run() -> None:
    """Wait for all processes and leave the process group: one that ends while another still needs it may be aborted.

    The folder ``.dist_test``, through which mmengine collected results, is removed if it is empty.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        with suppress(OSError):  # not there, another process was first, or another run uses it
            Path('.dist_test').rmdir()
