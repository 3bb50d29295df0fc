"""MMRazor's recorders and deliveries, as a step of this package enters them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from mmengine.logging import print_log
from mmrazor.models.task_modules.delivery import DistillDeliveryManager
from mmrazor.models.task_modules.recorder import ModuleOutputsRecorder, ParameterRecorder, RecorderManager
from torch import nn


@contextmanager
def recording(*managers: RecorderManager | DistillDeliveryManager) -> Iterator[None]:
    """Enter managers, one after the other, in a context that torch.compile can trace.

    What reads modules becomes part of the graph. What replaces a method or function breaks it, because a graph would
    go on with the replaced one.
    """
    if breaking(*managers):
        torch._dynamo.graph_break()
    for manager in managers:
        manager.__enter__()
    try:
        yield
    finally:
        for manager in reversed(managers):
            manager.__exit__(None, None, None)


def tell_of_breaks(*managers: RecorderManager | DistillDeliveryManager) -> None:
    """Log once what breaks the graph that torch.compile traces."""
    found = breaking(*managers)
    if found:
        _tell(', '.join(found))


@torch.compiler.disable
@cache
def _tell(names: str) -> None:
    print_log(
        f'torch.compile cannot make one graph of a step with {names}, which replaces a function: it runs in '
        "parts. Record a module's inputs or outputs instead if you can.",
        'current',
        logging.WARNING,
    )


def breaking(*managers: RecorderManager | DistillDeliveryManager) -> list[str]:
    """Name the recorders and deliveries that replace a method or function while they are entered."""
    parts = {
        name: part
        for manager in managers
        for name, part in getattr(manager, 'recorders', getattr(manager, 'deliveries', {})).items()
    }
    return [
        f'{name!r} ({type(part).__name__})'
        for name, part in parts.items()
        if not isinstance(part, ModuleOutputsRecorder | ParameterRecorder)
    ]


def hook_again(recorders: RecorderManager, network: nn.Module) -> None:
    """Hook recorders into a network again whose modules have been replaced since, as BatchNorm is by SyncBN.

    Raises:
        AssertionError: If the network has no such module any more.
    """
    hooks = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    for recorder in recorders.recorders.values():
        if isinstance(recorder, ModuleOutputsRecorder) and recorder._initialized and recorder.forward_hook not in hooks:
            recorder.prepare_from_model(network)
