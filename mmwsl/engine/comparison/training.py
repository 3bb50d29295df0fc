"""Train the runs of a comparison, several at a time, and report the progress."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from mmwsl.engine import runs
from mmwsl.engine.comparison.planning import Trained, epochs_of
from mmwsl.engine.runs import roughly

_TOLD_EVERY = 30  # seconds


def train_all(
    tool: Path,
    planned: Sequence[Trained],
    jobs: int,
    threads: int,
    tell: Callable[[str], None],
    every: float = _TOLD_EVERY,
) -> list[list[dict]]:
    """Train the runs that are not finished, several at a time, and return the logs of all in the order of the runs.

    Args:
        tool: tools/train.py.
        planned: The runs; finished ones are not repeated, killed ones resume.
        jobs: Runs at a time.
        threads: Threads of each run, on a CPU.
        tell: Called with a line when a run ends, and from time to time with the progress of all.
        every: Seconds between lines of progress.

    Raises:
        RuntimeError: If a run fails; runs in progress end first, and no others begin.
        ValueError: If a folder holds another run.
    """
    progress = _Progress(planned)  # reads all configs, so a mistake in the last one is found before the first run
    versions = {config: runs.version_of(config) for config in {run.config for run in planned}}
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future, int] = {
            pool.submit(runs.train, tool, run.config, run.work_dir, run.options, threads, versions[run.config]): number
            for number, run in enumerate(planned)
        }
        try:
            for future in _as_they_end(running, every, lambda: progress.tell(tell)):
                if future.result():
                    progress.tell(tell, f'{planned[running[future]].work_dir.name} is trained')
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [runs.scalars(run.work_dir) for run in planned]


def _as_they_end(running: Mapping[Future, int], every: float, meanwhile: Callable[[], None]) -> Iterator[Future]:
    left = set(running)
    while left:
        ended, left = wait(left, timeout=every, return_when=FIRST_COMPLETED)
        if not ended:
            meanwhile()
        yield from ended


class _Progress:
    """Counts the epochs that are done, and estimates the time that is left."""

    def __init__(self, planned: Sequence[Trained]) -> None:
        of_config = Counter(run.config for run in planned)
        self.planned, self.total = planned, sum(count * epochs_of(config) for config, count in of_config.items())
        self.begin, self.before = time.monotonic(), self._done()
        self.told = ''

    def _done(self) -> int:
        """Return the epochs that all runs have validated; the step of a validation is its epoch."""
        validated = (
            [line['step'] for line in runs.scalars(run.work_dir) if 'epoch' not in line] for run in self.planned
        )
        return sum(max(steps, default=0) for steps in validated)

    def tell(self, tell: Callable[[str], None], ended: str = '') -> None:
        """Tell the progress if a run has ended or more epochs are done."""
        line = self.line()
        epochs = line.partition(',')[0]
        if ended or epochs != self.told:
            tell(f'{ended}, {line}' if ended else line)
        self.told = epochs

    def line(self) -> str:
        done = self._done()
        now = done - self.before  # since this command began
        seconds = time.monotonic() - self.begin
        left = f', about {roughly(seconds * (self.total - done) / now)} left' if now > 0 and done < self.total else ''
        return f'{done} of {self.total} epochs{left}'
