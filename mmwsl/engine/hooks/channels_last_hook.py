from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmwsl.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Put the model's 4-D parameters into the memory format ``channels_last``, in which convolutions then compute.

    Results differ by rounding alone. On a CPU convolutions are faster: see MMRazor's two steps in
    tools/benchmarks/train_step.py. Modules that call ``view`` on a feature map fail in this format: mmpretrain's
    AlexNet and VGG, MMRazor's L2Loss, ChannelWiseDivergence, FTLoss and RKD. A model in DistributedDataParallel is not
    changed.

    Args:
        device_type: The device it applies to, 'cpu' or 'cuda'. None: both.
    """

    def __init__(self, device_type: str | None = 'cpu') -> None:
        self.device_type = device_type

    def before_train(self, runner: Runner) -> None:  # after the initial weights, which are drawn in memory order
        # DistributedDataParallel has laid out its buckets by now, and would garble gradients of another layout
        if not is_model_wrapper(runner.model) and self.device_type in (None, _device_type(runner.model)):
            runner.model.to(memory_format=torch.channels_last)


def _device_type(model: torch.nn.Module) -> str:
    return next(model.parameters()).device.type
