"""Let several training loops take steps in turns, and time each step."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable

import torch


class TimeIsUpError(Exception):
    """Ends the run of an arm."""


class Turns:
    """Lets threads take steps one after the other, and times each step.

    Each round has its own order, since a step finds the caches and threads as the one before it left them.

    Args:
        arms: Their names.
        seconds: Time after which no arm takes another step.
        after_round: Called with the times so far, by arm.
    """

    def __init__(
        self, arms: list[str], seconds: float, after_round: Callable[[dict[str, list[float]]], object]
    ) -> None:
        self.gates = {arm: threading.Semaphore(0) for arm in arms}
        self.times: dict[str, list[float]] = {arm: [] for arm in arms}
        self.missing: dict[str, str] = {}
        self.started = 0.0
        self.end = time.perf_counter() + seconds
        self.order = random.Random(0)
        self.waiting: list[str] = []
        self.stepping: str | None = None
        self.after_round = after_round
        self.lock = threading.RLock()

    def begin(self) -> None:
        """Let the next arm take its step."""
        with self.lock:
            if not self.waiting and self.gates:
                self.after_round(self.times)
                self.waiting = self.order.sample(list(self.gates), len(self.gates))
            self.stepping = self.waiting.pop() if self.waiting else None
            if self.stepping:
                self.gates[self.stepping].release()

    def wait(self, arm: str) -> None:
        self.gates[arm].acquire()
        self.started = time.perf_counter()
        if self.started > self.end:
            raise TimeIsUpError

    def done(self, arm: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[arm].append(time.perf_counter() - self.started)
        self.begin()

    def take_part(self, arm: str, run: Callable[[], object]) -> None:
        """Run an arm to its end; one that fails is left out from there on."""
        try:
            run()
        except TimeIsUpError:
            pass
        except Exception as error:
            traceback.print_exc()
            self.missing[arm] = reason_of(error)
        with self.lock:
            del self.gates[arm]
            self.waiting = [other for other in self.waiting if other != arm]
            if self.stepping == arm:
                self.begin()


def reason_of(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'
