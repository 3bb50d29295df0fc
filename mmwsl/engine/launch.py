"""What tools/train.py and tools/test.py share."""

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
from mmwsl.engine.config_checks import merge_options, warn_of_schedule, warn_of_unread_keys
from mmwsl.engine.data_checks import check_data, is_first_process
from mmwsl.utils.data import collate_for, set_dataloader_defaults
from mmwsl.utils.files import lock

_DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def launcher_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that training and testing have in common."""
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
        help='settings of the config to override, e.g. optim_wrapper.optimizer.lr=0.01; lists as '
        'key="[a,b]", without white space',
    )
    parser.add_argument('--no-pin-memory', action='store_true', help='switch pinned memory of the dataloaders off')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes one of the two, depending on its version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(path: str) -> Config:
    """Read a config file, or one that an installed package brings, as ``mmrazor::distill/mmcls/kd/....py``.

    Raises:
        FileNotFoundError: If it is not there.
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
        raise ModuleNotFoundError(f'{path} is a config of {package}, which is not installed')
    try:
        cfg = get_config(path) if separator else Config.fromfile(path)
    except SyntaxError as error:
        line = (error.text or '').strip()
        raise ValueError(
            f'{path}, or a config that it reads, is not Python: {error.msg} (line {error.lineno}: {line}). '
            'Mend this line, or the one above it'
        ) from error
    for package in ('mmdet', 'mmseg'):  # that a registry would import, with lines that mean nothing
        if package in f'{cfg.get("default_scope")} {cfg.get("model")}' and importlib.util.find_spec(package):
            import_quietly(f'{package}.datasets')
    return cfg


def _setting(text: str) -> str:
    if re.search(r'[^\s,(\[]\s+[^\s,)\]]', text):
        raise argparse.ArgumentTypeError(
            f'mmengine drops the white space within a setting, got {text!r}: put it into a config file'
        )
    return text


def prepare_run(cfg: Config, args: argparse.Namespace, dataloaders: tuple[str, ...] = _DATALOADERS) -> None:
    """Apply the common options to a config, and check what can be checked before anything is built.

    Args:
        cfg: The config, changed in place.
        args: Of :func:`launcher_parser`.
        dataloaders: Fields whose data have to be there.

    Raises:
        FileNotFoundError: If data are missing; the message says which layout is expected where.
        ValueError: If mixed precision is asked for without a GPU, or nothing would read an option.
    """
    # mmengine reads LOCAL_RANK, and MPI names it otherwise
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
        raise ValueError('--amp needs a GPU, and torch sees none here; leave it out to train in float32')
    check_data(cfg, dataloaders)
    distribute_without_cuda(cfg)


def add_hooks(cfg: Config) -> None:
    """Have a run resume exactly and only from its own checkpoints, save one when it is told to end, refuse labels that
    are no class, stop when it diverges, read from a GPU only what is logged, keep its best checkpoint, show how far it
    is and what it gained; and have a distillation compute only what is logged, and warn if its student learns nothing
    from labels.

    A hook that the config has is not added again.
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
    """Have a test show how far it is; a config that a run has written has the hook already."""
    hooks = cfg.get('custom_hooks') or []
    if not any('ProgressHook' in str(hook['type']) for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mmwsl.ProgressHook')]


def _keep_best(cfg: Config) -> None:
    """Have checkpoints written by a hook that keeps the best one, too, unless the config says which it wants."""
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
    """Keep other trainings out of a config's work dir, until this one ends or is killed.

    The first process of a run locks the file ``training.lock`` there, which the kernel releases. On a storage without
    locks a warning is logged.

    Raises:
        RuntimeError: If another training runs there; process, host and start are named.
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
    """Leave the process group together: a process that ends while another still talks to it may be aborted.

    The folder ``.dist_test``, through which mmengine collected results, is removed if it is empty.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        with suppress(OSError):  # not there, another process was first, or another run uses it
            Path('.dist_test').rmdir()
