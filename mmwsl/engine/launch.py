"""What tools/train.py and tools/test.py share."""
from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

from mmwsl.compat import distribute_without_cuda
from mmwsl.engine.config_checks import check_option_keys, warn_of_schedule, warn_of_unread_keys
from mmwsl.engine.data_checks import check_data
from mmwsl.utils.data import set_dataloader_defaults

_DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def launcher_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go; default: work_dirs/<name of the config>')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, type=_setting, metavar='KEY=VALUE',
                        help='settings of the config to override, e.g. optim_wrapper.optimizer.lr=0.01; lists as '
                        'key="[a,b]", without white space')
    parser.add_argument('--no-pin-memory', action='store_true', help='switch pinned memory of the dataloaders off')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes one of the two, depending on its version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _setting(text: str) -> str:
    if re.search(r'[^\s,(\[]\s+[^\s,)\]]', text):
        raise argparse.ArgumentTypeError(f'mmengine drops the white space within a setting, got {text!r}: put it into '
                                         'a config file')
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
    if args.cfg_options:
        check_option_keys(cfg, args.cfg_options)
        cfg.merge_from_dict(args.cfg_options)
    warn_of_unread_keys(cfg)
    warn_of_schedule(cfg)
    for field in _DATALOADERS:
        if cfg.get(field):
            set_dataloader_defaults(cfg[field], pin_memory=not args.no_pin_memory)
    if args.amp and not torch.cuda.is_available():
        raise ValueError('--amp needs a GPU, and torch sees none here; leave it out to train in float32')
    check_data(cfg, dataloaders)
    distribute_without_cuda(cfg)


def add_hooks(cfg: Config) -> None:
    """Have a run refuse another's checkpoint, stop when it diverges and read from a GPU only what is logged, and a
    distillation compute only what is logged.

    A hook that the config has is not added again.
    """
    cfg.default_hooks = {'runtime_info': dict(type='mmwsl.LateScalarsHook'), **(cfg.get('default_hooks') or {})}
    hooks = list(cfg.get('custom_hooks') or [])
    wanted = ['CheckResumeHook', 'FiniteLossHook', *(['LossStatisticsHook'] if cfg.model.get('distiller') else [])]
    cfg.custom_hooks = [*hooks, *(dict(type=f'mmwsl.{name}') for name in wanted
                                  if not any(name in str(hook['type']) for hook in hooks))]


def finish_run() -> None:
    """Leave the process group together: a process that ends while another still talks to it may be aborted."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
