"""Detect changes of a network."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class Watch:
    """Tells whether a network has changed since the last check.

    It detects replaced submodules, parameters, buffers and forward hooks, changed modes of modules, and weights that
    were written to. A write through ``.data`` increments no version counter: on a CPU a checksum of the weights detects
    it, on another device nothing does, because a step may not read values back from there. Changes of plain attributes
    (a stride, a replaced ``forward``) are not detected anywhere.

    A check of ResNet-56 (209 modules, 344 tensors) takes 0.6 ms on a CPU, 0.2 % of its forward pass of 64 images;
    without the checksum 0.1 ms.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._look()

    def has_changed(self) -> bool:
        """Compare the network with its state at the last check."""
        if self._state() == self._seen:
            return False
        self._look()
        return True

    def _look(self) -> None:
        self._modules = list(self._network.modules())
        self._contents = [content for module in self._modules for content in _contents(module)]
        self._held = [
            part for content in self._contents for part in content.values()
        ]  # kept alive, so that no id is reused
        self._tensors = [part for part in self._held if isinstance(part, Tensor)]
        self._counted = [
            tensor for tensor in self._tensors if not tensor.is_inference()
        ]  # inference tensors have no counter
        self._summed = [
            tensor for tensor in self._tensors if tensor.device.type == 'cpu' and tensor.is_floating_point()
        ]
        self._seen = self._state()

    def _state(self) -> tuple[list, ...]:
        return (
            [id(part) for content in self._contents for part in content.values()],
            [module.training for module in self._modules],
            [tensor._version for tensor in self._counted],
            [tensor.data_ptr() for tensor in self._tensors],
            [tensor.sum().item() for tensor in self._summed],
        )


def _contents(module: nn.Module) -> Iterator[dict]:
    yield from (module._modules, module._parameters, module._buffers)  # type: ignore[misc]
    yield from forward_hooks(module)


def forward_hooks(module: nn.Module) -> Iterator[dict]:
    """Yield the dictionaries with a module's forward hooks and forward pre-hooks."""
    yield module._forward_hooks
    yield module._forward_pre_hooks
