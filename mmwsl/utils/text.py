from __future__ import annotations

from collections.abc import Sequence

_NAMED = 3


def first_of(names: Sequence[str]) -> str:
    """A few of several names for a message, and how many more there are."""
    more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
    return f'{", ".join(names[:_NAMED])}{more}'
