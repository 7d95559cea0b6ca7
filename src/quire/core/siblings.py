"""Siblings: requests with the same tokens so far, such as the n answers to one prompt, or the beams of a search. One that
comes later takes over what lies in the last, unfinished page of another one, as a copy: from there on the two differ.

Whole pages are shared by name, see tables.py; what is here is what a name cannot say, because the page is not full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire.core.pages import NULL_PAGE
from quire.core.plan import PageCopy
from quire.core.request import Request
from quire.core.tables import PageTables, PositionPages


@dataclass(frozen=True, slots=True)
class Begun:
    """Pages at position `start` that begin with the same `count` tokens, computed: one of each group, with its index."""

    start: int
    count: int
    sources: tuple[tuple[int, int], ...]


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
    owner, longest = None, 0
    following = request.tokens[start]  # nearly all others go on otherwise, which is quickly seen
    for other in running:
        if other.computed <= start or other.tokens[start] != following or not _alike(request, other, start, tables):
            continue
        count = _common(request.tokens, other.tokens, start, min(end, other.computed))
        if count > longest:
            owner, longest = other, count
    if longest < most - start:
        left = _left_behind(request, tables, start, most)
        if left is not None:
            return left
    if owner is None:
        return None
    sources = [
        (index, owner.tables[index].pages[start // group.page_size])
        for index, group in enumerate(tables.groups)
        if isinstance(group, PositionPages)
    ]
    return Begun(start, longest, tuple(sources))


def leave_behind(request: Request, tables: PageTables) -> None:
    """Let a request that ends leave its last, unfinished page, to be found by one that has exactly one token more."""
    if not tables.caching or tables.has_state:
        return
    for index, group in enumerate(tables.groups):
        table, name = request.tables[index], tables.tail_name(request, index, request.computed)
        place = request.computed // group.page_size
        if name is not None and table.first <= place < len(table.pages):
            group.pool.name(table.pages[place], name)


def _left_behind(request: Request, tables: PageTables, start: int, end: int) -> Begun | None:
    """What an ended request has left of the positions from `start` to `end`.

    The pages may be given to anybody, even to this request, before they are copied: nobody writes to them before that.
    """
    sources = []
    for index, group in enumerate(tables.groups):
        if isinstance(group, PositionPages):
            if start % group.page_size or end - start >= group.page_size:
                return None
            name = tables.tail_name(request, index, end)
            page = NULL_PAGE if name is None else group.pool.find(name)
            if page == NULL_PAGE:
                return None
            sources.append((index, page))
    return Begun(start, end - start, tuple(sources))


def copies(request: Request, begun: Begun, tables: PageTables) -> list[PageCopy]:
    """The copies that bring the pages' content to the pages that the request has taken for that position."""
    found = []
    for index, source in begun.sources:
        target = request.tables[index].pages[begun.start // tables.groups[index].page_size]
        if source != target:
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
