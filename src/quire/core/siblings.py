"""Siblings: requests with the same tokens so far, such as the n answers to one prompt. One that comes later takes over what
lies in the last, unfinished page of one that runs, as a copy: from there on the two differ.

Whole pages are shared by name, see tables.py; what is here is what a name cannot say, because the page is not full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire.core.plan import PageCopy
from quire.core.request import Request
from quire.core.tables import PageTables, PositionPages


@dataclass(frozen=True, slots=True)
class Begun:
    """A running request whose page at position `start` begins with the same `count` tokens, computed."""

    owner: Request
    start: int
    count: int


def find_begun(request: Request, running: Iterable[Request], tables: PageTables, most: int) -> Begun | None:
    """The best page to copy for a request that was to start at its hit, `request.planned`, and may start at `most`.

    None without prefix caching, and for models with a state: that is of the position its owner has reached, and of no
    other.
    """
    sizes = [group.page_size for group in tables.groups if isinstance(group, PositionPages)]
    if not sizes or not tables.caching or tables.has_state:
        return None
    start = request.planned
    end = min(most, start + min(sizes))
    found = None
    for other in running:
        if other.computed <= start or not _alike(request, other, start, tables):
            continue
        count = _common(request.tokens, other.tokens, start, min(end, other.computed))
        if count > (0 if found is None else found.count):
            found = Begun(other, start, count)
    return found


def copies(request: Request, begun: Begun, tables: PageTables) -> list[PageCopy]:
    """The copies that bring the page's content to the page that the request has taken for that position."""
    found = []
    for index, group in enumerate(tables.groups):
        if isinstance(group, PositionPages):
            place = begun.start // group.page_size
            source, target = begun.owner.tables[index].pages[place], request.tables[index].pages[place]
            found.append(PageCopy(index, source, target))
    return found


def _alike(request: Request, other: Request, start: int, tables: PageTables) -> bool:
    """Whether everything before `start` is the same for both, and the other still has its page there."""
    if other.generation != request.generation or other.given.salt != request.given.salt:
        return False
    for group, table in zip(tables.groups, other.tables, strict=True):
        if isinstance(group, PositionPages) and not table.first <= start // group.page_size < len(table.pages):
            return False
    if not start:
        return True
    # Of the smallest page size, whose names are the first of a request's lists.
    last = start // min(group.page_size for group in tables.groups) - 1
    one, two = request.names[0], other.names[0]
    return last < min(len(one), len(two)) and one[last] == two[last]


def _common(one: Sequence[int], other: Sequence[int], start: int, end: int) -> int:
    """How many tokens from `start` on, before `end`, are the same."""
    count = 0
    while start + count < end and one[start + count] == other[start + count]:
        count += 1
    return count
