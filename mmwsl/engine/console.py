"""Limit what a run shows on the console; its log file has everything."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

_NEXT_TO_NOTHING = (  # beginnings of warnings of other packages that mean nothing to a user
    '"FileClient" will be deprecated',  # mmengine, of its own call
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
)
_MARK = 'console'  # attribute of log records that the console shows although they are not warnings


class _Filter(logging.Filter):
    """Passes warnings, errors and texts of :func:`tell`."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return hasattr(record, _MARK)
        return not record.getMessage().startswith(_NEXT_TO_NOTHING)


class _Formatter(logging.Formatter):
    """Formats the message alone, without time or traceback."""

    def format(self, record: logging.LogRecord) -> str:
        name = f'{record.levelname.capitalize()}: ' if record.levelno >= logging.WARNING else ''
        return name + record.getMessage()


def quiet(logger: Any) -> Any:
    """Limit a logger's console to warnings, errors and texts of :func:`tell`; its file still gets everything.

    Returns:
        The logger.
    """
    for handler in [] if is_quiet(logger) else _on_console(logger):
        handler.addFilter(_Filter())
        handler.setFormatter(_Formatter())
    return logger


def unquiet(logger: logging.Logger) -> None:
    """Let a quiet logger show everything again."""
    for handler in _on_console(logger):
        handler.filters = [found for found in handler.filters if not isinstance(found, _Filter)]


def is_quiet(logger: Any) -> bool:
    """Whether a logger is limited by :func:`quiet`."""
    return any(isinstance(found, _Filter) for handler in _on_console(logger) for found in handler.filters)


def tell(logger: logging.Logger, text: str) -> None:
    """Log a text, and show it on the console."""
    logger.info(text, extra={_MARK: True})


def show(logger: Any, text: str) -> None:
    """Show a text on the console of the first process, if it is quiet, and keep it out of the log file."""
    record = logging.makeLogRecord({'msg': text, 'levelno': logging.INFO, 'levelname': 'INFO', _MARK: True})
    for handler in _on_console(logger) if is_quiet(logger) else ():
        if record.levelno >= handler.level:
            handler.handle(record)  # unlike print(), it survives a console that is closed


def _on_console(logger: Any) -> list[Any]:
    return [
        handler
        for handler in getattr(logger, 'handlers', ())
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]


def build_runner(cfg: Config, verbose: bool = False) -> Runner:
    """Build the runner of a config.

    Args:
        cfg: The config.
        verbose: Whether the console shows mmengine's whole log.
    """
    kind = RUNNERS.get(cfg.runner_type) if 'runner_type' in cfg else Runner
    if verbose or kind is None:  # the registry names the type that it does not know
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)

    class Quiet(kind):  # type: ignore[misc, valid-type]
        def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
            return quiet(super().build_logger(*args, **kwargs))

        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            with redirect_stdout(io.StringIO()):  # mmengine prints the path
                return super().load_checkpoint(*args, **kwargs)

    Quiet.__name__ = kind.__name__
    runner = Quiet.from_cfg(cfg)
    quiet(runner.logger)  # also for a FlexibleRunner, whose strategy builds the logger
    return runner


@contextmanager
def one_screen(verbose: bool) -> Iterator[None]:
    """End a program with its error's message alone; the traceback goes to the log file.

    Args:
        verbose: Whether the traceback is shown instead.

    Raises:
        SystemExit: With status 1, in place of an Exception.
    """
    try:
        yield
    except Exception as error:
        if verbose:
            raise
        logger = quiet(MMLogger.get_current_instance())
        path = logger.log_file
        kind = '' if isinstance(error, ValueError | RuntimeError | OSError) else f'{type(error).__name__}: '
        logger.error(f'{kind}{error}', exc_info=error)
        show(logger, f'The traceback is in {path}.' if path else '--verbose shows the traceback.')
        raise SystemExit(1) from None
