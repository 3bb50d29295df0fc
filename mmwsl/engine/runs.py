"""Train configs in processes of their own: each run in its folder, resumed if it was killed, never repeated."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mmengine.config import Config

from mmwsl.engine import copies
from mmwsl.utils.files import lock, whole_file

_RECORD = 'run.json'
_SHOWN = 15  # lines
_ERROR = re.compile(r'([\w.]*Error|[\w.]*Exception): ')


def train(
    tool: Path,
    config: Path,
    work_dir: Path,
    options: Sequence[str] = (),
    threads: int = 1,
    version: str | None = None,
    fresh: bool = False,
) -> bool:
    """Train a config to its end: resume a run that was killed, return at once if it is finished.

    Args:
        tool: tools/train.py.
        config: The config file.
        work_dir: Where logs and checkpoints go, one for each run.
        options: Settings of the config to override, ``key=value``.
        threads: torch's threads, on a CPU.
        version: The config's, from :func:`version_of`. None resumes a run of any version.
        fresh: Train in a child of this process that imports all it needs, not in a copy (:mod:`mmwsl.engine.copies`).

    Returns:
        Whether there was anything left to train.

    Raises:
        ValueError: If ``work_dir`` holds a run of another config, with other options or of another version.
        RuntimeError: If training fails (the message ends with the last lines of its output), or another process trains
            in ``work_dir``.
    """
    record = dict(config=str(config), options=list(options), finished=False)
    if version is not None:
        record['version'] = version
    if _finished(work_dir, record):
        return False
    work_dir.mkdir(parents=True, exist_ok=True)
    command = [
        str(tool),
        str(config),
        '--work-dir',
        str(work_dir),
        '--resume',
        *(['--cfg-options', *options] if options else []),
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    output = work_dir / 'output.log'
    with (work_dir / 'lock').open('a') as held, output.open('a') as stream:
        lock(held, f'another process trains in {work_dir}, perhaps one left by a command that was killed')
        _write(work_dir, record)
        start = _run_afresh if fresh or not copies.possible() else _run_copied
        status = start(command, environment, stream.fileno(), held.fileno())
    if status:
        end = ending(output.read_text(errors='replace'))
        raise RuntimeError(f'training {config} failed with status {status}; {output} ends with\n{end}')
    _write(work_dir, {**record, 'finished': True})
    return True


def _run_copied(command: Sequence[str], environment: Mapping[str, str], output: int, held: int) -> int:
    """Do what ``_run_afresh`` does, in a copy if that is possible."""
    status = copies.run(Path(command[0]), command[1:], environment, output, held)
    return _run_afresh(command, environment, output, held) if status is None else status


def _run_afresh(command: Sequence[str], environment: Mapping[str, str], output: int, held: int) -> int:
    """Run a tool to its end and return its exit status; it keeps a lock even if this process is killed."""
    return subprocess.run(
        [sys.executable, *command],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        check=False,
        pass_fds=(held,) if os.name == 'posix' else (),  # on Windows locks are not inherited
    ).returncode


def ending(output: str) -> str:
    """Return the end of a failed tool's output: its error, or the last lines."""
    lines = output.strip().splitlines()[-_SHOWN:]
    errors = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    return '\n'.join(lines[errors[-1] :] if errors else lines)


def version_of(config: Path) -> str:
    """Return a hash of a config's settings, inherited ones included; comments do not change it."""
    said = json.dumps(Config.fromfile(config).to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def scalars(work_dir: Path) -> list[dict]:
    """Return what a run by epochs logged, in order: a dict for each logged step and each validation.

    A run that was killed within an epoch repeats at least a part of it; what it logged for these steps the first time
    is left out. The same holds for a validation.
    """
    lines: list[dict] = []
    for log in _logs(work_dir):
        attempt = _read(log)
        steps = [line for line in attempt if 'epoch' in line]
        trained = min((line['step'] for line in steps), default=math.inf)
        validated = min((line['step'] for line in attempt if 'epoch' not in line), default=math.inf)
        epoch = min((line['epoch'] for line in steps), default=math.inf)
        lines = [
            line for line in lines if line['step'] < (trained if 'epoch' in line else min(epoch, validated))
        ] + attempt
    return lines


def started(work_dir: Path) -> str | None:
    """Return when a run began, as 'YYYYMMDD_HHMMSS'; None before its first step."""
    logs = _logs(work_dir)
    return logs[0].parents[1].name if logs else None


def seconds(work_dir: Path) -> float:
    """Return the wall time of a run, summed over its attempts."""
    return sum(
        log.stat().st_mtime - datetime.strptime(log.parents[1].name, '%Y%m%d_%H%M%S').timestamp()
        for log in _logs(work_dir)
    )


def roughly(seconds: float) -> str:
    """Return a time as people say it: '40 s', '12 min', '3 h 20 min'."""
    if seconds < 90:
        return f'{max(1, round(seconds))} s'
    hours, minutes = divmod(round(seconds / 60), 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min'


def _finished(work_dir: Path, record: dict) -> bool:
    """Return whether a run is finished; raise ValueError if the folder holds another one."""
    if not (work_dir / _RECORD).exists():
        return False
    found = json.loads((work_dir / _RECORD).read_text())
    for field in ('config', 'options'):
        if found[field] != record[field]:
            raise ValueError(
                f'{work_dir} holds a run with {field} {found[field]}, not {record[field]}: choose another '
                'work dir, or delete it'
            )
    if 'version' in record and found.get('version', record['version']) != record['version']:
        raise ValueError(
            f'{found["config"]} has changed since its run in {work_dir} began, so the run has other '
            f'settings. Delete it (rm -r {work_dir}), or choose another folder for the runs'
        )
    return found['finished']


def _write(work_dir: Path, record: dict) -> None:
    with whole_file(work_dir / _RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())


def _logs(work_dir: Path) -> list[Path]:
    return sorted(work_dir.glob('*/vis_data/scalars.json'))


def _read(log: Path) -> list[dict]:
    lines = log.read_text().splitlines()
    try:
        read = [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise ValueError(f'{log} is damaged: a line of it is not JSON ({error}). Delete that line') from error
    with suppress(IndexError, json.JSONDecodeError):  # a full disk or a crash may cut the last one short
        read.append(json.loads(lines[-1]))
    return read
