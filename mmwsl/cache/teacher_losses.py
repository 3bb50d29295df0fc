from __future__ import annotations

from typing import Any


class TeacherLosses:
    losses: Any

    @classmethod
    def load(cls, path: str) -> TeacherLosses:
        raise NotImplementedError
