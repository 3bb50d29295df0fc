from __future__ import annotations

import logging

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmwsl.registry import HOOKS

_BLOCK = 16  # channels; 8 without AVX-512


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Put the model's 4-D parameters into the memory format ``channels_last``, in which convolutions then compute.

    Results differ by rounding alone. On a CPU convolutions are faster: see MMRazor's two steps in
    tools/benchmarks/train_step.py. Modules that call ``view`` on a feature map fail in this format: mmpretrain's
    AlexNet and VGG, MMRazor's L2Loss, ChannelWiseDivergence, FTLoss and RKD. Two kinds of model are not changed: one in
    DistributedDataParallel, and on a CPU, with a warning, one in which a convolution of 1 x 1 with a stride has fewer
    than 16 input channels, as the shortcuts of very thin ResNets have.

    Args:
        device_type: The device it applies to, 'cpu' or 'cuda'. None: both.
    """

    def __init__(self, device_type: str | None = 'cpu') -> None:
        self.device_type = device_type

    def before_train(self, runner: Runner) -> None:  # after the initial weights, which are drawn in memory order
        # DistributedDataParallel has laid out its buckets by now, and would garble gradients of another layout
        if is_model_wrapper(runner.model) or self.device_type not in (None, _device_type(runner.model)):
            return
        thin = _thin_shortcut(runner.model)
        if thin is not None:
            print_log(
                f'ChannelsLastHook leaves the model as it is: {thin} is a convolution of 1 x 1 with a stride and fewer '
                f'than {_BLOCK} input channels, whose gradient oneDNN computes wrongly in this format, or crashes',
                'current',
                level=logging.WARNING,
            )
            return
        # mmdet's KnowledgeDistillationSingleStageDetector has a `to` of its own, for a device alone
        torch.nn.Module.to(runner.model, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _device_type(model: torch.nn.Module) -> str:
    return next(model.parameters()).device.type


def _thin_shortcut(model: torch.nn.Module) -> str | None:
    """Return the name of a convolution for whose gradient oneDNN writes beyond its memory, if there is one.

    uxlfoundation/oneDNN issue 6035: such convolutions in channels_last, with less than a block of input channels.
    """
    if _device_type(model) != 'cpu':
        return None
    return next(
        (
            name
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Conv2d)
            and layer.weight.requires_grad
            and layer.kernel_size == (1, 1)
            and max(layer.stride) > 1
            and layer.in_channels // layer.groups < _BLOCK
        ),
        None,
    )
