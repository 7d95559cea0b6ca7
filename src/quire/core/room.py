"""Room: whether the pages last for another request, beside those that run and what they will want.

Knows page tables and requests; admits nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.params import SamplingParams
from quire.core.request import Request
from quire.core.tables import PageTables


@dataclass(frozen=True, slots=True)
class Blocked:
    """The front of the line could not be admitted when so many pages were to be had; fewer need not be tried."""

    request: Request
    slack: list[int]


def longest_hit(request: Request) -> int:
    """Positions that may come from the cache: never the last, and none whose log-probabilities are still owed."""
    params = request.given.params
    most = len(request.tokens) - 1
    if isinstance(params, SamplingParams) and params.prompt_report is not None:
        return most if request.logprobs_sent == request.rules.prompt_len - 1 else request.logprobs_sent
    return 0 if params.skip_reading_prefix_cache else most


class Room:
    """The pages of all groups, as a request that waits sees them. Counts of pages are per group."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        # Room for running requests to grow, so that admitting one does not soon preempt another.
        self._reserve = [max(1, group.pool.num_pages // 100) if group.grows else 0 for group in tables.groups]
        self._blocked: Blocked | None = None

    def slack(self, running: Sequence[Request]) -> list[int]:
        """Free pages that no running request will want in order to catch up."""
        slack = self._tables.free()
        for request in running:
            if request.planned < len(request.tokens):
                slack = [free - wanted for free, wanted in zip(slack, self._tables.demand(request), strict=True)]
        return self.with_reserve(slack) if running else slack

    def with_reserve(self, slack: list[int]) -> list[int]:
        """What of it may be given away while somebody runs."""
        return [free - reserve for free, reserve in zip(slack, self._reserve, strict=True)]

    def find(self, request: Request, hit: int, slack: list[int]) -> list[int] | None:
        """Let the request share what is known of its prefix, at most `hit` positions. Returns the pages that it takes or
        will want; None, and then it holds nothing, if that is more than `slack`.
        """
        before = self._tables.free()
        self._tables.adopt(request, hit)
        shared = [pages - now for pages, now in zip(before, self._tables.free(), strict=True)]
        total = [pages + more for pages, more in zip(shared, self._tables.demand(request), strict=True)]
        if all(pages <= limit for pages, limit in zip(total, slack, strict=True)):
            return total
        self.let_go(request)
        self._blocked = Blocked(request, slack)
        return None

    def let_go(self, request: Request) -> None:
        """Take back all pages of a request, which has nothing computed then."""
        self._tables.release(request)
        request.computed = request.planned = 0

    def was_refused(self, request: Request, slack: list[int]) -> bool:
        """True if this request was tried when at least as many pages were to be had. Spares it hashing and looking."""
        blocked = self._blocked
        if blocked is None or blocked.request is not request:
            return False
        return all(now <= then for now, then in zip(slack, blocked.slack, strict=True))

    def forget(self) -> None:
        """What was refused may be tried again."""
        self._blocked = None
