"""Enter MMRazor's recorders and deliveries in a step that torch.compile can trace."""

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

    Recorders of modules become part of the graph. Those that replace a method or function break the graph, which would
    otherwise keep calling the replacement.
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
    """Log once which recorders and deliveries break the graph of torch.compile."""
    found = breaking(*managers)
    if found:
        _tell(', '.join(found))


@torch.compiler.disable
@cache
def _tell(names: str) -> None:
    print_log(
        f'torch.compile cannot make one graph of a step with {names}, which replaces a function: the step runs in '
        "several graphs. If you can, record a module's inputs or outputs instead.",
        'current',
        logging.WARNING,
    )


def breaking(*managers: RecorderManager | DistillDeliveryManager) -> list[str]:
    """Describe the recorders and deliveries that replace a method or function while they are active."""
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
    """Hook recorders again into modules of a network that have been replaced, such as BatchNorm by SyncBN.

    Raises:
        AssertionError: If the network no longer has such a module.
    """
    hooks = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    for recorder in recorders.recorders.values():
        if isinstance(recorder, ModuleOutputsRecorder) and recorder._initialized and recorder.forward_hook not in hooks:
            recorder.prepare_from_model(network)
