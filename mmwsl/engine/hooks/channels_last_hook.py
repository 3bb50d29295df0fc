from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmwsl.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lay the model's 4-D parameters out in ``channels_last``, the memory format in which convolutions then compute.

    The mathematics is the same and rounding differs. On a CPU it makes convolutions faster: see MMRazor's two steps in
    tools/benchmarks/train_step.py. What calls ``view`` on a feature map fails in this format: mmpretrain's AlexNet and
    VGG, MMRazor's L2Loss, ChannelWiseDivergence, FTLoss and RKD. A model in DistributedDataParallel is left as it is.

    Args:
        device_type: Where it applies, 'cpu' or 'cuda'. None: everywhere.
    """

    def __init__(self, device_type: str | None = 'cpu') -> None:
        self.device_type = device_type

    def before_train(self, runner: Runner) -> None:  # initial weights are drawn in memory order: not before them
        # DistributedDataParallel has laid out its buckets by now; gradients of another layout come out of them wrong
        if not is_model_wrapper(runner.model) and self.device_type in (None, _device_type(runner.model)):
            runner.model.to(memory_format=torch.channels_last)


def _device_type(model: torch.nn.Module) -> str:
    return next(model.parameters()).device.type
