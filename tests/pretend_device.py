"""CUDA tensors without a GPU: with a shape and a device, and without memory.

They show a tensor on the wrong device and a value that is read back (either raises), the operations that are dispatched
and the copies from the CPU. They show no number, no speed and no race.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ['DataDependentOutputException', 'Device', 'pretend', 'why_not']

# A build without CUDA aborts where a CUDA tensor needs a gradient, because nothing can switch devices.
# Of no device, or a backward pass would start a thread for it, after which no forked process can run another pass.
_GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
static struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
} guard;
static struct Registration {
  Registration() { c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard); }
} registration;
"""
# launch nothing
_FREE = (
    'prim::',
    'promote_types',
    'empty',
    'new_empty',
    'scalar_tensor',
    'view',
    '_unsafe_view',
    'select',
    'slice',
    'unsqueeze',
    'squeeze',
    'expand',
    'detach',
    'alias',
    'permute',
    'transpose',
    'split',
    'unbind',
    'as_strided',
)


@functools.cache
def why_not() -> str:
    """Reason why there are no such tensors here; '' if there are. The first call builds what a CPU build lacks."""
    if torch.backends.cuda.is_built():
        return ''
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    if compiler is None:
        return 'needs a C++ compiler (g++, or CXX) to build a device guard'
    root, folder = Path(torch.__file__).parent, Path(tempfile.mkdtemp())
    (folder / 'guard.cpp').write_text(_GUARD)
    built = subprocess.run(
        [
            compiler,
            '-shared',
            '-fPIC',
            '-std=c++20',
            f'-I{root}/include',
            'guard.cpp',
            f'-L{root}/lib',
            '-lc10',
            '-o',
            'guard.so',
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if built.returncode:
        return f'{compiler} cannot build a device guard: {built.stderr[-300:]}'
    ctypes.CDLL(str(folder / 'guard.so'))
    shutil.rmtree(folder)
    return ''


class Device(TorchDispatchMode):
    """Counts what reaches the device.

    Attributes:
        operations: How often each operation was dispatched, without those that launch nothing, such as views.
        copies: From the CPU: shape, whether the memory was pinned, and whether the host goes on meanwhile.
    """

    def __init__(self, fake):
        super().__init__()
        self.fake, self.operations, self.copies, self._pinned = fake, Counter(), [], []

    def clear(self):
        self.operations.clear(), self.copies.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix('aten::')
        if not name.startswith(_FREE):
            self.operations[name] += 1
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self._note(result, args[func is torch.ops.aten.copy_.default], args, kwargs)
        return result

    def _note(self, result, source, args, kwargs):
        if source.device.type == 'cpu' and result.device.type == 'cuda':
            pinned = any(source.untyped_storage()._cdata == other.untyped_storage()._cdata for other in self._pinned)
            self.copies.append((tuple(source.shape), pinned, bool(kwargs.get('non_blocking') or args[2:3] == (True,))))

    def pinned(self, tensor):
        """The tensor in pinned memory, as a dataloader makes it."""
        self._pinned.append(tensor.clone())
        return self._pinned[-1]

    def tensor(self, real):
        """A tensor of the CPU without memory."""
        return self.fake.from_tensor(real)

    def to_cuda(self, module):
        """A module that was built outside of this, with its parameters and buffers on the device."""
        self.fake.allow_non_fake_inputs = True
        module.to('cuda')
        self.fake.allow_non_fake_inputs = False
        self.clear()
        return module


@contextmanager
def pretend(monkeypatch, counts=True):
    """Inside, ``device='cuda'`` works, and tensors of the outside are refused.

    Args:
        counts: Whether operations and copies are counted, of which torch.compile would trace nothing.
    """
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode() as fake, Device(fake) if counts else nullcontext() as counting:
            device = counting or Device(fake)
            # a copied tensor would bring a mode of its own
            monkeypatch.setattr(FakeTensorMode, '__deepcopy__', lambda mode, memo: mode, raising=False)
            monkeypatch.setattr(Tensor, 'pin_memory', lambda tensor, *_: device.pinned(tensor))
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
