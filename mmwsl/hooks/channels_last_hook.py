from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmwsl.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keep convolution weights in ``channels_last``, the memory format in which convolutions then compute.

    The mathematics is the same and rounding differs. On a CPU it is the faster format: a training step of ResNet-20
    on CIFAR takes 0.7 of the time. On a GPU that holds in mixed precision only.

    Args:
        device_type: Where it applies, 'cpu' or 'cuda'. None: everywhere.
    """

    def __init__(self, device_type: str | None = 'cpu') -> None:
        self.device_type = device_type

    def before_run(self, runner: Runner) -> None:
        if self.device_type in (None, next(runner.model.parameters()).device.type):
            runner.model.to(memory_format=torch.channels_last)
