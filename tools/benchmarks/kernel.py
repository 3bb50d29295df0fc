"""Show registers, spills and shared memory of the loss's Triton kernels, compiled for GPUs that need not be there.

Triton includes the compiler of CUDA's assembly, so this runs on any machine with the extra triton. It shows that
the kernels compile and how much of a GPU they take, but neither that they are right nor that they are fast. The bytes
are what has to move for each logit, forward and backward: both logits are read twice and one gradient is written, if a
program keeps its rows of classes; longer rows are read once more for the gradient.
"""

import os

os.environ.pop('TRITON_INTERPRET', None)  # before Triton is imported: what is interpreted is not compiled

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from loss import shape_of
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mmwsl.models.losses import kernel

SHAPES = [
    (64, 100),
    (256, 1000),
    (16384, 1000),
    (64, 16384),
    (64, 21841),
    (64, 100000),
    (8, 19, 128, 128),
    (8, 150, 512, 512),
    (8, 1000, 64, 64),
]
POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int64: '*i64'}
FOUND = {
    'registers': r'Used (\d+) registers',
    'spill_stores': r'(\d+) bytes spill stores',
    'spill_loads': r'(\d+) bytes spill loads',
}


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Any, tuple]]:
    """Yield each kernel with its arguments for logits of a shape, which are on the meta device."""
    preds = torch.empty(shape, dtype=dtype, device='meta')
    target = torch.empty(shape[0], *shape[2:], dtype=torch.int64, device='meta')
    terms = target.new_empty(5, target.numel(), dtype=torch.float32)
    gradient = preds.t().unsqueeze(0) if preds.dim() == 2 else preds.flatten(2)
    upstream = target.float().expand(target.shape).reshape(gradient.shape[0], -1)
    yield kernel.terms_kernel, kernel.launch(preds, preds, target, (terms,), 2.0, -100)
    yield kernel.gradient_kernel, kernel.launch(preds, preds, target, (gradient, upstream), 2.0, -100)


def source_of(function: Any, arguments: list, settings: dict) -> ASTSource:
    """Return what Triton compiles for these arguments: 1 becomes a constant, and multiples of 16 are marked."""
    named = {**dict(zip(function.arg_names, arguments, strict=False)), **settings}
    constants = {
        name: value for name, value in named.items() if name in settings or (type(value) is int and value == 1)
    }
    types = {name: 'constexpr' if name in constants else type_of(value) for name, value in named.items()}
    aligned = {
        (place,): [['tt.divisibility', 16]]
        for place, name in enumerate(function.arg_names)
        if isinstance(named[name], torch.Tensor)
        or (name not in constants and type(named[name]) is int and named[name] % 16 == 0)
    }
    return ASTSource(function, {name: types[name] for name in function.arg_names}, constants, aligned)


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return 'fp32' if isinstance(value, float) else 'i32' if -(2**31) <= value < 2**31 else 'i64'


def resources(function: Any, arguments: list, settings: dict, arch: int) -> dict[str, int]:
    options = {
        'num_warps': settings.pop('num_warps'),
        'sanitize_overflow': settings.pop('sanitize_overflow'),
        'debug': True,
    }
    compiled = triton_compile(
        source_of(function, arguments, settings), target=GPUTarget('cuda', arch, 32), options=options
    )
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(compiled.asm['ptx'])
        file.flush()
        told = subprocess.run(
            [get_ptxas(arch).path, '-v', f'--gpu-name=sm_{arch}{"a" * (arch >= 90)}', file.name, '-o', os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    found = {name: int(re.search(pattern, told)[1]) for name, pattern in FOUND.items()}  # type: ignore[index]
    code = compiled.asm['ptx']
    return {
        **found,
        'float64': '.f64' in code,
        'asserts_classes': 'assertfail' in code,
        'shared_bytes': compiled.metadata.shared,
        'warps': options['num_warps'],
        'rows': settings['ROWS'],
        'block': settings['BLOCK'],
    }


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes that have to move for each logit, forward and backward."""
    looped = next(iter(launches(shape, dtype)))[1][2]['LOOPED']
    return (7 if looped else 5) * dtype.itemsize


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', nargs='+', type=int, default=[80, 90], help='compute capability, as 90 for an H100')
    parser.add_argument(
        '--dtype', nargs='+', default=['bfloat16', 'float32'], choices=['float32', 'bfloat16', 'float16']
    )
    parser.add_argument('--shapes', nargs='+', type=shape_of, default=SHAPES, metavar='NxC')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for shape in args.shapes:
        for dtype in (getattr(torch, name) for name in args.dtype):
            for arch in args.arch:
                for function, (_, arguments, settings) in launches(shape, dtype):
                    row = {
                        'kernel': function.__name__,
                        'shape': list(shape),
                        'dtype': str(dtype)[6:],
                        'arch': arch,
                        'bytes_per_logit': bytes_of(shape, dtype),
                        **resources(function, arguments, settings, arch),
                    }
                    print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
