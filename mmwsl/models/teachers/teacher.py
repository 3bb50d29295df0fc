"""A frozen network with the interface that a distillation needs: one call for each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmrazor.models.task_modules.delivery import DistillDeliveryManager
from mmrazor.models.task_modules.recorder import ModuleOutputsRecorder, RecorderManager
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmwsl.cache import CacheError
from mmwsl.models.teachers.cached_teacher import CachedTeacher
from mmwsl.models.teachers.fast import check_speed, fast_forward
from mmwsl.models.teachers.inputs import InputAdapter, input_adapter
from mmwsl.models.teachers.recording import hook_again, recording
from mmwsl.models.teachers.watch import Watch, forward_hooks
from mmwsl.utils.sharding import shard_frozen


class FrozenTeacher:
    """Runs a frozen teacher on a batch, and fills MMRazor's recorders with what a distiller reads of it.

    The network always stays in eval mode (dropout and drop-path included) and has no gradient. This object is not a
    module, so the teacher is not part of a model that holds it: not of its checkpoint, optimiser or
    DistributedDataParallel.

    While the student trains and only the network's output is read, a faster copy replaces the network. The copy is
    dropped at the first call after the network has changed (:class:`mmwsl.models.teachers.watch.Watch` lists the
    changes that are detected), and is made again once the network is unchanged for two calls, so a teacher that changes
    at each step is never copied. The network itself runs whenever the student is in eval mode or other code has a
    forward hook in the network. Copies and pickles of this object make their own fast copy.

    torch.compile can trace a call as a part of one graph if :meth:`prepare` was called before, outside the graph;
    otherwise the traced call runs the network itself.

    Args:
        network: The network. It stays the same object, but its SyncBN layers become BatchNorm.
        norm_eval: False lets its BatchNorm predict with batch statistics while the student trains; its running
            statistics never change.
        speed: One of :data:`mmwsl.models.teachers.fast.SPEEDS`.
        sharding: Whether the processes share its parameters, from the first call on, instead of each holding all. It
            then runs as it is, since a fast copy would be whole, and all processes have to call it equally often.

    Raises:
        TypeError: If the network is not a BaseModel of mmengine.
        ValueError: If the speed is unknown, or needs a copy of a sharded network.
    """

    def __init__(self, network: BaseModel, norm_eval: bool = True, speed: str = 'fold', sharding: bool = False) -> None:
        check_speed(speed)
        if sharding and speed not in ('plain', 'fold'):
            raise ValueError(
                f'teacher_speed={speed!r} needs a copy of the whole teacher, and teacher_sharding=True keeps none '
                'whole: leave one of them out'
            )
        if not isinstance(network, BaseModel):
            raise TypeError(
                f'teacher should be a config or a BaseModel of mmengine, got {type(network)}. Wrap another '
                'kind of network in a BaseModel whose forward takes (inputs, data_samples, mode)'
            )
        self.network = revert_sync_batchnorm(network)
        self.norm_eval, self.speed, self.training = norm_eval, 'plain' if sharding else speed, False
        self.sharding = sharding
        self.recorders, self.deliveries = RecorderManager(), DistillDeliveryManager()
        self._own_preprocessor = self.network.data_preprocessor
        self._mode: str | None = None  # unknown before the first batch
        self._only_output_is_read = self._change_is_said = self._is_tried = False
        self._is_prepared = self._is_fast = False  # for the next call
        self._copy: Callable[..., Any] | None = None
        self._watch: Watch | None = None
        self._freeze()

    def _freeze(self) -> None:
        self.network.requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm) and not self.norm_eval:
                module.track_running_stats = False
        self.train(False)

    @torch.compiler.disable  # it compares memory, and compiles and copies networks itself
    @torch.no_grad()
    def prepare(self, inputs: Tensor, data_samples: list | None = None) -> None:
        """Find out what is read of the network and whether a fast copy may replace it, for the next call.

        A call does this itself unless torch.compile traces it, which cannot compare memory.

        Args, Raises: As :meth:`__call__`.
        """
        self.place(inputs.device)
        if self._mode is None:
            self._find_mode(inputs, data_samples)
        if isinstance(self.network, CachedTeacher):
            self.network.restore(inputs, data_samples)
        fast = self.speed != 'plain' and self.training and self._has_copy(inputs, data_samples)
        self._is_prepared, self._is_fast = True, fast

    @property
    def is_sharded(self) -> bool:
        """Whether the network is sharded once it is placed: ``sharding`` is set and there are several processes."""
        return self.sharding and get_world_size() > 1

    def place(self, device: torch.device) -> None:
        """Move the network to the device of the images, once, whole or in shards.

        FSDP and DeepSpeed only move a model's submodules.
        """
        parameter = next(self.network.parameters(), None)
        if self.is_sharded:
            if parameter is not None and not isinstance(parameter, DTensor):
                shard_frozen(self.network, device)
        elif parameter is not None and parameter.device != device:
            self.network.to(device)

    def train(self, mode: bool = True) -> None:
        """Set whether the student trains; the network stays in eval mode, except BatchNorm with ``norm_eval=False``."""
        self.training = mode
        hook_again(self.recorders, self.network)
        self.network.eval()  # not chained: the train() of some networks returns None
        for module in self.network.modules():
            if isinstance(module, _BatchNorm) and not self.norm_eval:
                module.train(mode)

    def use_inputs_of(self, data_preprocessor: nn.Module, normalises: bool = False) -> None:
        """Use the inputs of the student's preprocessor, converted to those of the network's own.

        Args:
            data_preprocessor: The student's preprocessor; it replaces the network's.
            normalises: As for :func:`mmwsl.models.teachers.inputs.input_adapter`.

        Raises:
            ValueError: As :func:`mmwsl.models.teachers.inputs.input_adapter`.
        """
        adapter = input_adapter(self._own_preprocessor, data_preprocessor, normalises)
        self.network.data_preprocessor = data_preprocessor
        if adapter is not None:
            self.network.register_forward_pre_hook(adapter, with_kwargs=True)

    def is_read_by(self, recorders: RecorderManager, deliveries: DistillDeliveryManager) -> None:
        """Let each call fill MMRazor's recorders, which have been hooked into the network, and its deliveries."""
        self.recorders, self.deliveries = recorders, deliveries
        self._mode, self._copy, self._is_tried = None, None, False

    def release(self) -> None:
        """Restore the network's own preprocessor, and remove the hooks of recorders and of its input adapter."""
        self.network.data_preprocessor = self._own_preprocessor
        for module in self.network.modules():
            for hooks in forward_hooks(module):
                for key in [key for key, hook in hooks.items() if self._is_own(hook)]:
                    del hooks[key]

    @torch.no_grad()
    def __call__(self, inputs: Tensor, data_samples: list | None = None) -> Any:
        """Run the teacher on a batch, and fill the recorders and deliveries.

        Args:
            inputs: Images as the student sees them. Shape: (N, C, H, W).
            data_samples: Their data samples, which some networks need.

        Returns:
            Output of the network: logits of shape (N, C), or a tree of tensors. If a recorder or delivery reads from
            the head's loss, the network's result in ``mode='loss'``.

        Raises:
            CacheError: If the first batch has cached answers of a teacher and this is not a CachedTeacher.
        """
        if self._mode is None or not (self._is_prepared or torch.compiler.is_compiling()):
            self.prepare(inputs, data_samples)
        fast, self._is_prepared = self._is_prepared and self._is_fast, False
        return self._fast_pass(inputs, data_samples) if fast else self._whole_pass(inputs, data_samples)

    def _whole_pass(self, inputs: Tensor, data_samples: list | None) -> Any:
        self.deliveries.override_data = False
        with recording(self.recorders, self.deliveries):
            return self.network(inputs, data_samples, mode=self._mode)

    def _fast_pass(self, inputs: Tensor, data_samples: list | None) -> Any:
        output = self._copy(inputs, data_samples)  # type: ignore[misc]
        with recording(self.recorders):
            for recorder in self.recorders.recorders.values():
                recorder.forward_hook(self.network, (inputs,), output)
        return output

    def _find_mode(self, inputs: Tensor, data_samples: list | None) -> None:
        """Choose ``mode='tensor'``, unless that leaves a recorder or delivery empty whose source is in the head's loss;
        then ``mode='loss'``."""
        if data_samples and 'teacher_answer' in data_samples[0] and not isinstance(self.network, CachedTeacher):
            raise CacheError(
                'the samples have cached answers of a teacher, and the model runs its teacher live: set '
                'model.teacher_cache to the folder of mmwsl.CachedViews, or use mmwsl.SeededViews'
            )
        self._mode = 'tensor'
        output = self._whole_pass(inputs, data_samples)
        buffers = [recorder.data_buffer for recorder in self.recorders.recorders.values()]
        queues = [delivery.data_queue for delivery in self.deliveries.deliveries.values()]
        if not all(map(len, (*buffers, *queues))):
            self._mode = 'loss'
        self._only_output_is_read = (
            not queues
            and all(len(buffer) == 1 and buffer[0] is output for buffer in buffers)
            and all(type(recorder) is ModuleOutputsRecorder for recorder in self.recorders.recorders.values())
        )
        for queue in queues:
            queue.clear()

    def _has_copy(self, inputs: Tensor, data_samples: list | None) -> bool:
        """Whether there is a fast copy of the network as it is now; if the network is unchanged, try to make one."""
        if self._watch is None:
            self._watch = Watch(self.network)
        elif self._watch.has_changed():
            self._drop_copy()
            return False
        if not self._is_tried:
            self._is_tried = True
            if self._only_output_is_read and not self._has_foreign_hooks():
                self._copy = fast_forward(self.network, inputs, self.speed, data_samples)
        return self._copy is not None

    def _drop_copy(self) -> None:
        if self._copy is not None and not self._change_is_said:
            self._change_is_said = True
            print_log(
                'The teacher has changed since its fast copy was made. The copy is not used until the teacher is '
                'unchanged for two batches, and is then made again (this is logged once).',
                logger='current',
            )
        self._copy, self._is_tried = None, False

    def _has_foreign_hooks(self) -> bool:
        """Whether other code has hooks in the network, apart from the preprocessor, which does not run here."""
        return any(
            not self._is_own(hook)
            for module in self.network.modules()
            if module is not self.network.data_preprocessor
            for hooks in forward_hooks(module)
            for hook in hooks.values()
        )

    def _is_own(self, hook: Any) -> bool:
        owner = getattr(hook, '__self__', None)
        return isinstance(hook, InputAdapter) or any(
            owner is recorder for recorder in self.recorders.recorders.values()
        )

    def __getstate__(self) -> dict:
        """Leave out the fast copy, which cannot be copied or pickled once it is compiled."""
        return {**self.__dict__, '_copy': None, '_is_tried': False, '_is_prepared': False, '_watch': None}
