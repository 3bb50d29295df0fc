"""Find mistakes in a config before a run, and explain errors in the config's own words."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner

# What mmengine's Runner, its launchers and our tools read at the top of a config.
_READ = {
    *inspect.signature(Runner.__init__).parameters,
    'auto_scale_lr',
    'compile',
    'custom_imports',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}
_READ_BY_LOOPS = {
    'train_cfg': ('type', 'by_epoch', 'max_epochs', 'max_iters', 'val_begin', 'val_interval', 'dynamic_intervals'),
    'val_cfg': ('type', 'fp16'),
    'test_cfg': ('type', 'fp16'),
}
_DENSE = 'It comes with the extra dense: in a clone, make install DENSE=1; for pip, see docs/dense.md'
_EXTRAS = {'mmdet': _DENSE, 'mmseg': _DENSE}


def check_static_graph(cfg: Config) -> None:
    """Raise ValueError for ``static_graph=True`` with accumulated gradients, which are not sent in every step."""
    counts = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    if (cfg.get('model_wrapper_cfg') or {}).get('static_graph') and counts > 1:
        raise ValueError(
            'model_wrapper_cfg.static_graph=True needs gradients to be sent in each step, and '
            f'optim_wrapper.accumulative_counts={counts} sends them every {counts} steps: leave one of them out'
        )


def check_option_keys(cfg: Config, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a command-line option that nothing would read, or whose path the config does not have.

    Args:
        cfg: The config, before the options are merged.
        options: Values by dotted key.
    """
    for option in options:
        field, _, rest = option.partition('.')
        if field not in _READ and field not in cfg:
            raise ValueError(f'--cfg-options {option}: nothing reads {field!r}{_did_you_mean(field, _READ)}')
        if field not in _READ:
            print_log(
                f'--cfg-options {option} does not change what the config has already made from {field!r}.',
                'current',
                logging.WARNING,
            )
        key = rest.partition('.')[0]
        loop = cfg.get(field) or {}
        known = _READ_BY_LOOPS.get(field, ())
        if key and known and 'type' not in loop and key not in (*known, *loop):
            raise ValueError(f'--cfg-options {option}: nothing reads {key!r} of {field}{_did_you_mean(key, known)}')
        if problem := _wrong_turn(cfg, option.split('.')):
            raise ValueError(f'--cfg-options {option}: {problem}')


def _wrong_turn(cfg: Config, keys: Sequence[str]) -> str | None:
    """Return where a dotted key treats a dict of the config as a list, or a list as a dict; None if it does not."""
    value: Any = cfg.get(keys[0])
    for depth, key in enumerate(keys[1:], 1):
        path, rest = '.'.join(keys[:depth]), '.'.join(keys[depth + 1 :])
        if isinstance(value, list):
            if not key.isdigit():
                return f'{path} is a list of {len(value)}. Name one of its entries by number, such as {path}.0.{key}'
            if int(key) >= len(value):
                return f'{path} has no entry {key}. Count its {len(value)} entries from 0'
            if not rest:
                return f'{path}.{key} is a whole entry of a list. Name a setting in it, such as {path}.{key}.type'
            value = value[int(key)]
        elif isinstance(value, Mapping):
            if key.isdigit() and 'type' in value and key not in value:
                return f'{path} is a dict, not a list. Leave the number out: {".".join(filter(None, (path, rest)))}'
            if key not in value:
                return None
            value = value[key]
        else:
            return None
    return None


def merge_options(cfg: Config, options: Mapping[str, Any] | None) -> None:
    """Merge command-line options into a config.

    Raises:
        ValueError: See :func:`check_option_keys`.
    """
    if options:
        check_option_keys(cfg, options)
        cfg.merge_from_dict(options)


def warn_of_unread_keys(cfg: Config) -> None:
    """Log a warning for each top-level key of a config that looks misspelt."""
    for key in cfg:
        meant = [name for name in sorted(_READ) if key not in _READ and _one_slip(key, name)]
        if meant:
            print_log(f'Nothing reads {key!r} in the config. Did you mean {meant[0]!r}?', 'current', logging.WARNING)


def warn_of_schedule(cfg: Config) -> None:
    """Log a warning for each schedule by epochs that ends at another epoch than training does."""
    epochs = (cfg.get('train_cfg') or {}).get('max_epochs')
    schedulers = cfg.get('param_scheduler') or []
    if not epochs or not isinstance(schedulers, Mapping | list):
        return
    for place, scheduler in enumerate([schedulers] if isinstance(schedulers, Mapping) else schedulers):
        for problem in _misfits(scheduler, epochs) if scheduler.get('by_epoch', True) else ():
            print_log(
                f'param_scheduler[{place}] ({scheduler["type"]}) does not fit train_cfg.max_epochs={epochs}: '
                f'{problem}.',
                'current',
                logging.WARNING,
            )


def _misfits(scheduler: Mapping, epochs: int) -> Iterator[str]:
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    period = scheduler.get('T_max')
    last = epochs if end is None else min(end, epochs)
    if period is not None and begin + period != last:
        yield (f'its cosine ends after epoch {begin + period}: set T_max={last - begin} to end it with training')
    late = [milestone for milestone in scheduler.get('milestones') or () if milestone >= epochs]
    if late:
        yield f'the milestones {late} are never reached'
    if end is not None and end > epochs:
        yield f'end={end} is never reached'


@contextmanager
def explained_config() -> Iterator[None]:
    """Explain unknown types and arguments of configs that are built in this context, with the closest known name.

    Raises:
        ValueError: In place of the TypeError or KeyError that mmengine's registries raise.
    """
    try:
        yield
    except (TypeError, KeyError) as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        raise ValueError(explanation) from error


def _explanation(error: TypeError | KeyError) -> str | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == 'build_from_cfg']
    found = frames[-1].f_locals if frames else {}
    kind, registry = found.get('obj_cls'), found.get('registry')
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown and inspect.isclass(kind) and unknown[1] in found.get('args', ()):
        names = _arguments(kind)
        return (
            f'{kind.__name__} has no argument {unknown[1]!r}{_did_you_mean(unknown[1], names)} It takes '
            f'{", ".join(names)}.'
        )
    if isinstance(error, KeyError) and kind is None and isinstance(registry, Registry):
        name = str(found.get('obj_type'))
        missing = _missing_package(name, found.get('scope'))
        if missing:
            return f'there is no {registry.name} {name!r}: {missing}'
        return (
            f'there is no {registry.name} {name!r}{_did_you_mean(name, _registered(registry.root))} For a class of '
            'your own, name its module in custom_imports.'
        )
    return None


def _missing_package(name: str, scope: str | None) -> str | None:
    """How to get the package that a type was looked for in, if it is one of the extras and not installed."""
    prefix, dot, _ = name.partition('.')
    current = DefaultScope.get_current_instance()
    package = prefix if dot else scope or (current.scope_name if current else 'mmengine')
    if package not in _EXTRAS or importlib.util.find_spec(package):
        return None
    return f'{package} is not installed. {_EXTRAS[package]}.'


def _arguments(kind: type) -> list[str]:
    """Return the arguments of a class and, if it passes further ones on, of its bases."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if '__init__' not in vars(base) or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names.update(
            dict.fromkeys(
                name
                for name, parameter in parameters.items()
                if name != 'self' and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            )
        )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return list(names)


def _registered(registry: Registry) -> list[str]:
    """Return the names in a registry and its children, as a config writes them."""
    children = registry.children.items()
    return [
        *registry.module_dict,
        *(f'{scope}.{name}' for scope, child in children for name in child.module_dict),
        *(name for _, child in children for name in child.module_dict),
    ]


def _one_slip(written: str, name: str) -> bool:
    """Whether two names differ only in the order of letters, or in one that is missing, extra or wrong."""
    shorter, longer = sorted((written, name), key=len)
    if len(shorter) == len(longer):
        return sorted(written) == sorted(name) or sum(map(str.__ne__, written, name)) == 1
    return any(longer[:place] + longer[place + 1 :] == shorter for place in range(len(longer)))


def _did_you_mean(name: str, known: Collection[str]) -> str:
    elsewhere = [other for other in known if other.endswith(f'.{name}')]  # in another scope
    close = elsewhere or difflib.get_close_matches(name, set(known), n=1, cutoff=0.6)
    return f'. Did you mean {close[0]!r}?' if close else '.'
