"""Load networks from files: strictly, and nothing but weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmwsl.compat import downloaded, kept_download, sha256
from mmwsl.utils.files import whole_file
from mmwsl.utils.looks_like import looks_like
from mmwsl.utils.text import first_of

STUDENT = 'architecture.'  # MMRazor's name for the student
_WRAPPER = 'module.'


def unwrapped_model(model: Any) -> Any:
    """Return what a wrapper such as DistributedDataParallel holds, or the model itself if there is none."""
    return model.module if is_model_wrapper(model) else model


def load_network(model: nn.Module, path: str) -> None:
    """Load a network strictly from a file.

    Args:
        model: The network.
        path: File or URL of an mmengine checkpoint (of a distillation's, the student is used), or of a state dict.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeCheckpointError: If it holds more than weights and what mmengine stores.
        ValueError: See :func:`load_weights`.
    """
    weights = read_weights(path)
    load_weights(model, student_weights(weights) or weights, path)


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    advice: str = 'If it comes from other code, convert it with tools/model_converters/import_teacher.py',
) -> None:
    """Load a state dict strictly, without the prefix ``module.`` of DataParallel.

    torch does the loading, so a layer that adapts what it loads, such as a vision transformer's position embedding,
    still does so.

    Args:
        model: The network.
        weights: The state dict.
        source: Where it comes from, for the message.
        advice: Last sentence of the message.

    Raises:
        ValueError: If a key is missing, unexpected or of another shape; the source and the first of each are named.
    """
    listed = load_what_fits(model, weights)
    if listed:
        raise ValueError(
            f'the checkpoint {source!r} looks like {looks_like(weights)}, the config has '
            f'{looks_like(model.state_dict())}, so it does not fit this {type(model).__name__}. '
            f'{listed}. {advice}'
        )


def load_what_fits(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """Load a state dict as :func:`load_weights` does, and return the first keys of those that do not fit, by kind."""
    if all(key.startswith(_WRAPPER) for key in weights):
        weights = {key.removeprefix(_WRAPPER): value for key, value in weights.items()}
    try:
        # no metadata goes with it, so old files may lack BatchNorm's counter, which nothing reads
        found = model.load_state_dict(dict(weights), strict=False)
        problems = {'missing': found.missing_keys, 'unexpected': found.unexpected_keys}
    except RuntimeError as error:  # it names wrong shapes alone
        expected = model.state_dict().keys()
        problems = {
            'missing': list(expected - weights.keys()),
            'unexpected': list(weights.keys() - expected),
            'of another shape': re.findall(r'size mismatch for (.*)\.$', str(error), re.M) or [str(error)],
        }
    return '; '.join(f'{what}: {first_of(sorted(keys))}' for what, keys in problems.items() if keys)


def read_weights(
    path: str,
    advice: str = 'Train the network first (tools/compare.py CONFIG trains a teacher; '
    'configs/vanilla/ has configs), name its file in model.teacher_ckpt, or convert a published one with '
    'tools/model_converters/import_teacher.py',
) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, on the CPU.

    Args:
        path: File or URL.
        advice: Last sentence of the message if there is no such file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no state dict.
    """
    try:
        checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    except FileNotFoundError as error:
        if '://' in str(path):
            raise  # its message says where a download is kept
        raise FileNotFoundError(f'there is no checkpoint {str(path)!r}. {advice}') from error
    for key in ('state_dict', 'model', 'net'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if (
        not isinstance(checkpoint, dict)
        or not checkpoint
        or not all(isinstance(value, Tensor) for value in checkpoint.values())
    ):
        raise ValueError(
            f'{str(path)!r} holds no state dict: expected tensors by name, alone or under state_dict, '
            f'model or net, got {_describe(checkpoint)}'
        )
    return checkpoint


def read_classes(path: str) -> tuple[str, ...]:
    """Return the names of the classes in an mmengine checkpoint, in order; empty if it has none."""
    return classes_in(read_meta(path))


def classes_in(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes in a checkpoint's ``meta``, in order; empty if it has none."""
    return tuple((meta.get('dataset_meta') or {}).get('classes') or ())


def read_meta(path: str) -> dict[str, Any]:
    """Return the ``meta`` of an mmengine checkpoint: config, classes, epoch and so on; empty if it has none."""
    checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    return (checkpoint.get('meta') if isinstance(checkpoint, dict) else None) or {}


def check_files(paths: Sequence[str], expected: str | Sequence[str] | None, required: bool = True) -> list[str]:
    """Return and log the SHA-256 of a teacher's files, and compare them with those that a config states.

    Args:
        paths: Files or URLs of checkpoints.
        expected: ``model.teacher_sha256``: the SHA-256 of each in order, or at least its first eight digits; for one
            file also a string. None compares nothing.
        required: Whether a missing file is downloaded, or else an error. A cached teacher does not need its file.

    Returns:
        The SHA-256 of each file; empty if one is missing, or on a storage that only mmengine reads.

    Raises:
        ValueError: If a file differs or cannot be compared, or there is not one SHA-256 for each.
    """
    stated = [expected] if isinstance(expected, str) else list(expected or ())
    if stated and len(stated) != len(paths):
        raise ValueError(
            f'model.teacher_sha256 should have one SHA-256 for each of the {len(paths)} files of the '
            f'teacher ({first_of(paths)}), got {len(stated)}'
        )
    found = {path: _sha256_of(path, fetch=required) for path in paths}
    for path, digest in zip(stated and paths, stated, strict=True):
        if not re.fullmatch('[0-9a-fA-F]{8,64}', digest):
            raise ValueError(
                f'model.teacher_sha256 takes at least eight hexadecimal digits for each file, got '
                f'{digest!r}: sha256sum {path} prints them'
            )
        if found[path] is None and required:
            raise ValueError(
                f'model.teacher_sha256 cannot be compared with {path}, which is no local file: copy it '
                'here, or leave teacher_sha256 out'
            )
        if not (found[path] or digest).startswith(digest.lower()):
            raise ValueError(
                f'{path} is not the file that model.teacher_sha256 names: its SHA-256 is {found[path]}, '
                f'expected {digest}. Put that file there again, or if this one is meant, set '
                f'model.teacher_sha256={found[path]}'
            )
    for path, known in found.items():
        print_log(f"The teacher's file {path} has the SHA-256 {known or '(unknown: the file is not here)'}.", 'current')
    return [] if None in found.values() else [str(known) for known in found.values()]


def _sha256_of(path: str, fetch: bool) -> str | None:
    file = Path(os.path.expanduser(path))
    if path.startswith(('http://', 'https://')):
        if fetch and get_rank() == 0:
            downloaded(path, progress=True)
        barrier()
        file = kept_download(path)
    return sha256(file) if file.is_file() else None


def student_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's part of a distillation's state dict; empty for any other state dict.

    In MMRazor's data-free distillation only the student has a wrapper, whose prefix ``module.`` is left out.
    """
    return {
        key[len(STUDENT) :].removeprefix(_WRAPPER): value for key, value in weights.items() if key.startswith(STUDENT)
    }


def save_weights(weights: dict[str, Tensor], path: str, classes: Sequence[str] = ()) -> None:
    """Write a state dict and the names of its classes, if any, as mmpretrain loads them; completely or not at all."""
    meta = {'dataset_meta': {'classes': tuple(map(str, classes))}} if classes else {}
    with whole_file(Path(path)) as file:
        torch.save({'meta': meta, 'state_dict': weights}, file)


def _describe(checkpoint: object) -> str:
    if isinstance(checkpoint, dict):
        return f'a dict with the keys {sorted(map(str, checkpoint))[:8]}'
    return type(checkpoint).__name__
