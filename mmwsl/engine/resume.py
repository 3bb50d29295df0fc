"""Find the checkpoint that a run resumes from."""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

_POINTER = 'last_checkpoint'


def latest_checkpoint(work_dir: str | Path) -> str | None:
    """Return the checkpoint that a run in this folder resumes from, or None if there is none.

    It is the one that mmengine's file ``last_checkpoint`` names, looked up in this folder first, since the folder may
    have moved. If a kill or a full disk has left that file empty, cut short or without a name that opens, it is the
    newest checkpoint that opens.

    Raises:
        RuntimeError: If there are checkpoints and none of them opens.
    """
    folder = Path(work_dir)
    pointer = folder / _POINTER
    named = Path(pointer.read_text(errors='replace').strip()) if pointer.is_file() else Path()
    newest = sorted(
        (path for path in folder.glob('*.pth') if not path.name.startswith('best_')),
        key=lambda path: path.stat().st_mtime_ns,
        reverse=True,
    )
    candidates = list(dict.fromkeys(path for path in (folder / named.name, named, *newest) if path.is_file()))
    for path in candidates:
        try:
            CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
        except Exception as error:  # the next older one may be whole
            print_log(f'{path} does not open, trying an older one: {error}', 'current', logging.WARNING)
            continue
        if path != candidates[0] or not named.name:
            print_log(
                f'{pointer} does not name a checkpoint that opens; resuming from {path}.', 'current', logging.WARNING
            )
        elif path.parent.resolve() != folder.resolve():
            print_log(
                f'{pointer} names a checkpoint in another folder: resuming from {path}.', 'current', logging.WARNING
            )
        return str(path)
    if candidates:
        raise RuntimeError(
            f'none of the checkpoints in {folder} opens: {", ".join(path.name for path in candidates)}. '
            'Start again in another --work-dir, or leave --resume out'
        )
    return None
