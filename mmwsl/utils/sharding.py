"""Networks in shards over processes, by torch's ``fully_shard`` (FSDP 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LEAST = 10**6
"""Fewest parameters that are worth gathering as one unit."""


def shard_frozen(network: nn.Module, device: torch.device) -> None:
    """Shard a frozen network over all processes, in place, and move it to the device unit by unit.

    Each unit is gathered when it is called and freed right after, so a process holds its part and one unit. All
    processes have to call the network equally often.

    Args:
        network: The same in each process.
        device: Where it computes. On a GPU torch uses the process's current one.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))

    def shard(unit: nn.Module) -> None:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)  # torch would keep the outermost whole

    for child in network.children():
        shard_units(child, LEAST, shard)
    shard(network)


def shard_units(module: nn.Module, least: float, shard: Callable[[nn.Module], Any]) -> int:
    """Shard a module's parts from the inside out, in units of at least so many parameters.

    Returns:
        How many parameters are left to a unit around it.
    """
    # a MultiheadAttention reads its parts' weights without calling them
    parts = () if isinstance(module, nn.MultiheadAttention) else tuple(module.children())
    left = sum(parameter.numel() for parameter in module.parameters(recurse=not parts))
    left += sum(shard_units(part, least, shard) for part in parts)
    if left < least or isinstance(module, nn.ModuleList | nn.ModuleDict):  # nobody calls these
        return left
    shard(module)
    return 0
