"""PagePool: who owns each page of one layer group, which free pages still hold known content, what is evicted next.

PageNames: the name of a page is a keyed hash of everything its content depends on. Nothing here knows requests, layers
or tensors: a page is an integer.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

NULL_PAGE = 0
NAME_BYTES = 16


class PageNames:
    """Names pages by content: 128-bit hashes, each made of the one before it and the page's tokens.

    A page's keys and values depend on all tokens before it, so a name stands for the whole prefix. The key is random
    per process: nobody outside can search for tokens whose page would be taken for somebody else's.
    """

    __slots__ = ("_page", "_root")

    def __init__(self, key: bytes | None = None) -> None:
        secret = secrets.token_bytes(32) if key is None else key
        # Copying a hash that has taken in its key is cheaper than keying a new one for every page.
        self._root = blake2b(digest_size=NAME_BYTES, key=secret, person=b"root")
        self._page = blake2b(digest_size=NAME_BYTES, key=secret, person=b"page")

    def root(self, salt: bytes) -> bytes:
        """The name before the first page: `salt` is what else the content depends on (model, adapter, media, tenant)."""
        name = self._root.copy()
        name.update(salt)
        return name.digest()

    def follow(self, previous: bytes, token_ids: Sequence[int]) -> bytes:
        """The name of the page with `token_ids` that follows the page named `previous`."""
        name = self._page.copy()
        name.update(previous + array("q", token_ids).tobytes())
        return name.digest()


class PagePool:
    """The pages 1 .. num_pages - 1 of one layer group. Page 0 is the null page and belongs to nobody.

    A page is in exactly one of three places:
      blank   free, content worthless
      kept    free, but named: a later request with the same prefix may share it; oldest given back is evicted first
      owned   by one or more owners; it may be named too, and then further owners may share it
    """

    __slots__ = ("_blank", "_kept", "_names", "_owners", "_page_of", "num_pages")

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._owners = [0] * num_pages
        self._names: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(num_pages - 1, 0, -1))  # a stack, lowest page on top
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that take() can hand out: blank ones, and kept ones after eviction."""
        return len(self._blank) + len(self._kept)

    @property
    def named(self) -> int:
        """Pages whose content is known by name, owned or not."""
        return len(self._page_of)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages with one owner each; the caller has checked `free`. Evicts the oldest kept pages."""
        assert count <= self.free, f"{count} pages asked for, {self.free} free"
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self._forget(page)
            self._owners[page] = 1
            pages.append(page)
        return pages

    def find(self, name: bytes) -> int:
        """The page with this name, or NULL_PAGE."""
        return self._page_of.get(name, NULL_PAGE)

    def kept_pages(self) -> Iterable[int]:
        """Free pages whose content is still known, the next to be evicted first."""
        return self._kept.keys()

    def share(self, page: int) -> None:
        """One more owner for a named page, which leaves the free pages if it was there."""
        assert self._names[page] is not None, f"page {page} has no name"
        if self._owners[page] == 0:
            del self._kept[page]
        self._owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One owner fewer for each page. Of those that become free, the first in the order given is evicted first."""
        owners = self._owners
        for page in pages:
            assert owners[page] > 0, f"page {page} given back by nobody"
            owners[page] -= 1
            if owners[page]:
                continue
            if self._names[page] is None:
                self._blank.append(page)
            else:
                self._kept[page] = None

    def name(self, page: int, name: bytes) -> None:
        """Make an owned page known. If another page has the same content already, this one stays nameless."""
        assert self._owners[page] > 0, f"page {page} is named while nobody owns it"
        if name not in self._page_of and self._names[page] is None:
            self._names[page] = name
            self._page_of[name] = page

    def forget_all(self) -> None:
        """Drop every name: no page can be shared any more, those owned stay with their owners."""
        for page in list(self._page_of.values()):
            self._forget(page)
        self._blank.extend(self._kept)
        self._kept.clear()

    def check(self, owners: Mapping[int, int]) -> None:
        """Assert that every page is in exactly one place and that `owners` (page -> holders) is what is counted here."""
        blank, kept, named = set(self._blank), self._kept.keys(), set(self._page_of.values())
        assert len(blank) == len(self._blank), "a page is blank twice"
        assert not blank & kept, f"pages both blank and kept: {blank & kept}"
        assert NULL_PAGE not in blank and NULL_PAGE not in kept and NULL_PAGE not in owners, "the null page is in use"
        for page, (counted, held) in enumerate(zip(self._owners, map(owners.get, range(self.num_pages)), strict=True)):
            assert counted == (held or 0), f"page {page}: {counted} owners counted, {held or 0} found"
        free = {page for page, count in enumerate(self._owners) if not count and page != NULL_PAGE}
        assert blank | kept == free, f"pages lost, or free while owned: {free ^ (blank | kept)}"
        assert not blank & named, f"blank pages with a name: {blank & named}"
        assert kept <= named, f"kept pages without a name: {kept - named}"
        listed = {name: page for page, name in enumerate(self._names) if name is not None}
        assert listed == self._page_of, "names of pages and pages of names disagree"

    def _forget(self, page: int) -> None:
        name = self._names[page]
        assert name is not None
        del self._page_of[name]
        self._names[page] = None
