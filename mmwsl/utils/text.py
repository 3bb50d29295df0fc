"""Text for people: lists in messages, tables in pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NAMED = 3


def first_of(names: Sequence[str]) -> str:
    """Return the first few of several names for a message, and how many more there are."""
    more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
    return f'{", ".join(names[:_NAMED])}{more}'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in (columns, ['---'] * len(columns), *rows))


def with_table(text: str, name: str, tool: str, made: str) -> str:
    """Return a page with the table between its marks replaced; the marks hold its name and its tool."""
    begin, end = marks(name, tool)
    return re.sub(f'{begin}.*?{end}', lambda _: f'{begin}\n\n{made}\n\n{end}', text, flags=re.S)


def marks(name: str, tool: str) -> tuple[str, str]:
    """Return the comments that mark a table in a page: its name, and the tool below tools/ that writes it."""
    return f'<!-- {name}: written by tools/{tool}.py -->', f'<!-- end of {name} -->'
