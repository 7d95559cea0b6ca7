"""PageTables: which pages each request holds, per layer group, and which it may share with earlier requests.

One class per way of holding pages, all with the same methods; a further kind of layer is one more class. Nothing here
knows budgets, policies or steps.

Why pages may be given back while a plan that uses them is still running: the worker executes plans one after another,
and within a plan first copies, then computes. A page given back between plan N and plan N + 1 is used by N at the
latest; whoever gets it is granted it in N + 1 or later and writes each position before reading it. What a dead request
still writes in N lies behind its computed positions, so never in a page that has a name: those are full and computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from quire.core.pages import NULL_PAGE, PageNames, PagePool
from quire.core.plan import GroupSpec, PageCopy, PageGrant
from quire.core.request import NOWHERE, Request, Table

NEVER = 1 << 62  # a position that no request reaches


class PageGroup(Protocol):
    """How requests hold pages in one layer group. Positions are counted from the start of the request."""

    pool: PagePool
    page_size: int
    grows: bool  # whether a request needs further pages while it generates

    def hit(self, names: Sequence[bytes], length: int) -> int:
        """The longest prefix, at most `length` positions, after which a request could go on with known pages."""
        ...

    def adopt(self, table: Table, names: Sequence[bytes], length: int) -> None:
        """Share the known pages that a request starting at `length` needs; hit() has found them."""
        ...

    def reach(self, computed: int) -> int:
        """The position before which a span must end because the whole pool could not hold more."""
        ...

    def least(self, positions: int, encoder: int, chunked: bool) -> int:
        """Pages without which a request that computes so many positions can never run."""
        ...

    def demand(self, table: Table, computed: int, positions: int, encoder: int) -> int:
        """Further pages that the request will want at once on its way to `positions`."""
        ...

    def trim(self, table: Table, computed: int) -> None:
        """Give back what no position from `computed` on can see."""
        ...

    def missing(self, table: Table, end: int, encoder: int) -> int:
        """Pages to take before positions up to `end` can be computed."""
        ...

    def room(self, table: Table) -> int:
        """Positions that the pages held can take."""
        ...

    def publish(self, table: Table, names: Sequence[bytes], computed: int) -> None:
        """Let the pool know the pages that are full and computed."""
        ...


class PositionPages:
    """A page per `page_size` positions; with a window, those that all later positions cannot see are given back."""

    grows = True

    def __init__(self, spec: GroupSpec, budget: int) -> None:
        self.pool = PagePool(spec.num_pages)
        self.page_size = spec.page_size
        self._usable = spec.num_pages - 1
        self._window = spec.window if spec.kind == "window" else None
        # What a window and one span can cover at most, wherever they begin in their first page.
        self._most = NEVER if self._window is None else _pages(self._window + budget - 2, self.page_size) + 1

    def _first(self, position: int) -> int:
        """The first page that a query at `position` can see."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self.page_size

    def hit(self, names: Sequence[bytes], length: int) -> int:
        """All pages before the hit, or those that the window still covers there."""
        find, size = self.pool.find, self.page_size
        count = length // size
        if self._window is None:
            for index in range(count):
                if not find(names[index]):
                    return index * size
            return count * size
        while count:
            first, index = self._first(count * size), count - 1
            while index >= first and find(names[index]):
                index -= 1
            if index < first:
                return count * size
            count = index  # page `index` is unknown, so the hit ends before it
        return 0

    def adopt(self, table: Table, names: Sequence[bytes], length: int) -> None:
        """Share the pages found by hit(); positions that left the window get null entries."""
        count = length // self.page_size
        table.first = min(self._first(length), count)
        table.pages = [NULL_PAGE] * table.first
        for name in names[table.first : count]:
            page = self.pool.find(name)
            self.pool.share(page)
            table.pages.append(page)
        table.published = count

    def reach(self, computed: int) -> int:
        """With a window, the whole pool from the first visible page on."""
        return NEVER if self._window is None else (self._first(computed) + self._usable) * self.page_size

    def least(self, positions: int, encoder: int, chunked: bool) -> int:
        """All positions at once; or, in pieces of one position, a window that begins at the end of a page."""
        whole = _pages(positions, self.page_size)
        if self._window is None or not chunked:
            return whole
        return min(whole, _pages(self._window - 1, self.page_size) + 1)

    def demand(self, table: Table, computed: int, positions: int, encoder: int) -> int:
        """The pages up to `positions`, but not more at a time than the window and one span cover."""
        held = len(table.pages) - table.first
        wanted = _pages(positions, self.page_size) - max(table.first, self._first(computed))
        return max(0, min(wanted, self._most, self._usable) - held)

    def trim(self, table: Table, computed: int) -> None:
        """Give back the pages that left the window, the oldest to be evicted first."""
        first = min(self._first(computed), len(table.pages))
        if first > table.first:
            self.pool.give_back(table.pages[table.first : first])
            table.pages[table.first : first] = [NULL_PAGE] * (first - table.first)
            table.first = first

    def missing(self, table: Table, end: int, encoder: int) -> int:
        """Pages for the positions behind those held."""
        return max(0, _pages(end, self.page_size) - len(table.pages))

    def room(self, table: Table) -> int:
        """Positions up to the end of the last page."""
        return len(table.pages) * self.page_size

    def publish(self, table: Table, names: Sequence[bytes], computed: int) -> None:
        """Name the pages that became full."""
        count = computed // self.page_size
        for index in range(max(table.published, table.first), count):
            self.pool.name(table.pages[index], names[index])
        table.published = count


class StatePage:
    """One page, which holds a recurrent state; a snapshot of it on the page grid lets a later request go on from there.

    A snapshot is taken by a copy at the start of the step that computes the positions behind it, and named once that
    step has come back, so that no name stands for a state that was never computed.
    """

    grows = False

    def __init__(self, spec: GroupSpec) -> None:
        self.pool = PagePool(spec.num_pages)
        self.page_size = spec.page_size

    def hit(self, names: Sequence[bytes], length: int) -> int:
        """The last snapshot."""
        for count in range(length // self.page_size, 0, -1):
            if self.pool.find(names[count - 1]):
                return count * self.page_size
        return 0

    def adopt(self, table: Table, names: Sequence[bytes], length: int) -> None:
        """Hold the snapshot until it is copied."""
        if length:
            table.snapshot = self.pool.find(names[length // self.page_size - 1])
            self.pool.share(table.snapshot)

    def reach(self, computed: int) -> int:
        """A state has no end."""
        return NEVER

    def least(self, positions: int, encoder: int, chunked: bool) -> int:
        """One page."""
        return 1

    def demand(self, table: Table, computed: int, positions: int, encoder: int) -> int:
        """One page, at the start."""
        return 1 - len(table.pages)

    def trim(self, table: Table, computed: int) -> None:
        """A state page is never given back early."""

    def missing(self, table: Table, end: int, encoder: int) -> int:
        """One page, at the start."""
        return 1 - len(table.pages)

    def room(self, table: Table) -> int:
        """A state has no end."""
        return NEVER

    def publish(self, table: Table, names: Sequence[bytes], computed: int) -> None:
        """States are named as snapshots, not as they grow."""

    def keep(self, table: Table, name: bytes) -> int:
        """A page to copy the state to, if one is free and the content is not known yet; otherwise NULL_PAGE."""
        if table.snapshot or self.pool.find(name) or not self.pool.free:
            return NULL_PAGE
        table.snapshot = self.pool.take(1)[0]
        return table.snapshot


class EncoderPages:
    """Pages for the encoder's positions, taken when the request starts."""

    grows = False

    def __init__(self, spec: GroupSpec) -> None:
        self.pool = PagePool(spec.num_pages)
        self.page_size = spec.page_size

    def hit(self, names: Sequence[bytes], length: int) -> int:
        """Any: the encoder's output is computed anew for each request."""
        return length

    def adopt(self, table: Table, names: Sequence[bytes], length: int) -> None:
        """Nothing is shared."""

    def reach(self, computed: int) -> int:
        """The decoder's positions do not matter."""
        return NEVER

    def least(self, positions: int, encoder: int, chunked: bool) -> int:
        """All encoder positions."""
        return _pages(encoder, self.page_size)

    def demand(self, table: Table, computed: int, positions: int, encoder: int) -> int:
        """All encoder positions, at the start."""
        return _pages(encoder, self.page_size) - len(table.pages)

    def trim(self, table: Table, computed: int) -> None:
        """Every position sees the whole encoder."""

    def missing(self, table: Table, end: int, encoder: int) -> int:
        """All encoder positions, at the start."""
        return _pages(encoder, self.page_size) - len(table.pages)

    def room(self, table: Table) -> int:
        """The decoder's positions do not matter."""
        return NEVER

    def publish(self, table: Table, names: Sequence[bytes], computed: int) -> None:
        """Nothing is shared."""


def _pages(positions: int, page_size: int) -> int:
    return -(-positions // page_size)


def make_group(spec: GroupSpec, budget: int) -> PageGroup:
    """The class for a kind of group; `budget` is the longest span."""
    if spec.kind == "state":
        return StatePage(spec)
    if spec.kind == "cross":
        return EncoderPages(spec)
    return PositionPages(spec, budget)


class PageTables:
    """The pages of all requests in all groups. The Scheduler is its only user."""

    def __init__(self, specs: Iterable[GroupSpec], budget: int, caching: bool) -> None:
        self.groups: list[PageGroup] = [make_group(spec, budget) for spec in specs]
        self.caching = caching
        self._names = PageNames()
        self._generation = 0
        self._sizes = sorted({group.page_size for group in self.groups})
        self._chain = [self._sizes.index(group.page_size) for group in self.groups]
        self._grid = math.lcm(*self._sizes) if self._sizes else 1
        self._states = [index for index, group in enumerate(self.groups) if isinstance(group, StatePage)]

    @property
    def has_state(self) -> bool:
        """True when some layers carry a recurrent state."""
        return bool(self._states)

    def new_tables(self) -> list[Table]:
        """Empty tables for a new request."""
        return [Table() for _ in self.groups]

    def new_names(self) -> list[list[bytes]]:
        """Empty name lists for a request, one per page size."""
        return [[] for _ in self._sizes]

    def free(self) -> list[int]:
        """Free pages per group."""
        return [group.pool.free for group in self.groups]

    def adopt(self, request: Request, most: int) -> int:
        """Share the longest known prefix of at most `most` positions and return its length, where the request starts."""
        length = 0
        if request.generation != self._generation:
            request.generation, request.names = self._generation, self.new_names()
        if self.caching and most > 0:
            self._extend_names(request, most)
            length, before = most, NEVER
            while length < before:  # each group may shorten the hit; agreed when none did
                before = length
                for group, chain in zip(self.groups, self._chain, strict=True):
                    length = group.hit(request.names[chain], length)
        for group, chain, table in zip(self.groups, self._chain, request.tables, strict=True):
            group.adopt(table, request.names[chain], length)
        request.computed = request.planned = length
        self._set_marks(request)
        request.snapshot_at = self._snapshot_position(request)
        return length

    def follows(self, request: Request, running: Iterable[Request], most: int) -> bool:
        """Whether the page after the request's hit is just being computed by one before it, so that waiting pays.

        `most` is the longest hit allowed. A state can only be taken over where its owner's prompt ends: no use waiting.
        """
        end = request.computed + self._grid
        if not self.caching or self._states or end > most:
            return False
        index = end // self._sizes[0] - 1
        name = request.names[0][index]
        return any(
            other.computed < end <= other.planned
            and other.key < request.key
            and index < len(other.names[0])
            and other.names[0][index] == name
            for other in running
        )

    def least(self, positions: int, encoder: int, chunked: bool) -> list[int]:
        """Per group, the pages without which such a request can never run."""
        return [group.least(positions, encoder, chunked) for group in self.groups]

    def demand(self, request: Request) -> list[int]:
        """Per group, the further pages this request will want on the way to its last known token."""
        positions, encoder = len(request.tokens), request.given.encoder_tokens
        return [
            group.demand(table, request.computed, positions, encoder)
            for group, table in zip(self.groups, request.tables, strict=True)
        ]

    def reach(self, request: Request) -> int:
        """The position before which the request's next span must end."""
        return min((group.reach(request.computed) for group in self.groups), default=NEVER)

    def fits(self, request: Request, end: int) -> bool:
        """Whether pages for the positions up to `end` are free, once those that left their window are given back."""
        encoder, fits = request.given.encoder_tokens, True
        for group, table in zip(self.groups, request.tables, strict=True):
            group.trim(table, request.computed)
            fits = fits and group.missing(table, end, encoder) <= group.pool.free
        return fits

    def extend(self, request: Request, end: int) -> list[PageGrant]:
        """Take the pages for the positions up to `end`; fits() has found them free. Returns what the worker must learn."""
        grants = []
        encoder = request.given.encoder_tokens
        for index, (group, table) in enumerate(zip(self.groups, request.tables, strict=True)):
            missing = group.missing(table, end, encoder)
            if missing:
                table.pages.extend(group.pool.take(missing))
            if table.granted < len(table.pages):
                grants.append(PageGrant(request.slot, index, table.granted, tuple(table.pages[table.granted :])))
                table.granted = len(table.pages)
        request.room = min(
            (group.room(table) for group, table in zip(self.groups, request.tables, strict=True)), default=NEVER
        )
        if request.snapshot_at != NOWHERE:
            request.room = min(request.room, request.snapshot_at)
        return grants

    def restore(self, request: Request) -> list[PageCopy]:
        """The copies by which an admitted request gets the states that adopt() found."""
        copies = []
        for index in self._states:
            table = request.tables[index]
            if table.snapshot:
                copies.append(PageCopy(index, table.snapshot, table.pages[0]))
                # Whoever gets this page next is written to after the copy has read it: see the module's text.
                self.groups[index].pool.give_back((table.snapshot,))
                table.snapshot = NULL_PAGE
        return copies

    def keep_states(self, request: Request) -> list[PageCopy]:
        """The copies that keep the states at request.snapshot_at, where the next span starts."""
        copies = []
        for index in self._states:
            group, table = self.groups[index], request.tables[index]
            assert isinstance(group, StatePage)
            target = group.keep(table, self._state_name(request, index))
            if target:
                copies.append(PageCopy(index, table.pages[0], target))
        if not copies:
            request.snapshot_at = NOWHERE
        return copies

    def publish(self, request: Request) -> None:
        """Name what has become full, and the snapshots of the step that came back."""
        self._extend_names(request, request.computed)
        for group, chain, table in zip(self.groups, self._chain, request.tables, strict=True):
            group.publish(table, request.names[chain], request.computed)
        if NOWHERE < request.snapshot_at < request.computed:
            for index in self._states:
                pool, table = self.groups[index].pool, request.tables[index]
                if table.snapshot:
                    pool.name(table.snapshot, self._state_name(request, index))
                    pool.give_back((table.snapshot,))
                    table.snapshot = NULL_PAGE
            request.snapshot_at = NOWHERE
        self._set_marks(request)

    def release(self, request: Request) -> None:
        """Give everything back, the tail first, so that it is evicted before the beginning that others may share."""
        for group, table in zip(self.groups, request.tables, strict=True):
            if table.snapshot:
                group.pool.give_back((table.snapshot,))
            group.pool.give_back(reversed(table.pages[table.first :]))
        request.tables = self.new_tables()
        request.room = 0

    def forget(self) -> None:
        """Drop all names and choose a new key: pages computed before can never be found again.

        A running request goes on naming its pages by its old names, which nobody can ask for any more.
        """
        self._names = PageNames()
        self._generation += 1
        for group in self.groups:
            group.pool.forget_all()

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that the pools' owner counts are what the requests' tables hold."""
        owners: list[Counter[int]] = [Counter() for _ in self.groups]
        for request in requests:
            for index, table in enumerate(request.tables):
                held = table.pages[table.first :]
                assert NULL_PAGE not in held, f"{request.given.request_id} holds the null page in group {index}"
                assert not any(table.pages[: table.first]), "an entry before the window still has a page"
                assert table.granted == len(table.pages), "the worker does not know all pages of a table"
                owners[index].update(held)
                if table.snapshot:
                    owners[index][table.snapshot] += 1
        for group, held_pages in zip(self.groups, owners, strict=True):
            group.pool.check(held_pages)

    def tail_name(self, request: Request, index: int, end: int) -> bytes | None:
        """What a page of group `index` is named while it holds the tokens before `end` and no more; None if it is full."""
        size = self.groups[index].page_size
        count, rest = divmod(end, size)
        if not rest or request.generation != self._generation:
            return None
        self._extend_names(request, end)
        names = request.names[self._chain[index]]
        before = names[count - 1] if count else self._names.root(request.given.salt)
        return self._names.follow(before, request.tokens[count * size : end])

    def _extend_names(self, request: Request, positions: int) -> None:
        tokens = request.tokens
        for size, names in zip(self._sizes, request.names, strict=True):
            if not names and positions >= size:
                root = self._names.root(request.given.salt)
                names.append(self._names.follow(root, tokens[:size]))
            for start in range(len(names) * size, positions - size + 1, size):
                names.append(self._names.follow(names[-1], tokens[start : start + size]))

    def _set_marks(self, request: Request) -> None:
        """Note at which position publish() has work to do again."""
        request.publish_at = NEVER
        if self.caching and self._sizes:
            request.publish_at = min((request.computed // size + 1) * size for size in self._sizes)
            if request.snapshot_at != NOWHERE:
                request.publish_at = min(request.publish_at, request.snapshot_at + 1)

    def _snapshot_position(self, request: Request) -> int:
        """The last position on the page grid that a request with the same tokens could start from."""
        if not self.caching or not self._states:
            return NOWHERE
        position = (len(request.tokens) - 1) // self._grid * self._grid
        return position if position > request.computed else NOWHERE

    def _state_name(self, request: Request, index: int) -> bytes:
        self._extend_names(request, request.snapshot_at)
        return request.names[self._chain[index]][request.snapshot_at // self.groups[index].page_size - 1]
