"""Stats: the scheduler's counters and gauges as plain data. How they are shown is not known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Queue:
    """Requests that wait, and their known tokens."""

    requests: int = 0
    tokens: int = 0

    def plus(self, requests: int, tokens: int) -> Queue:
        """A queue with more in it."""
        return Queue(self.requests + requests, self.tokens + tokens)


def joined(queues: Mapping[str, Queue], more: Mapping[str, Queue]) -> dict[str, Queue]:
    """Queues by tenant with others added to them; empty ones are left out."""
    found = dict(queues)
    for tenant, queue in more.items():
        found[tenant] = found.get(tenant, Queue()).plus(queue.requests, queue.tokens)
    return {tenant: queue for tenant, queue in found.items() if queue.requests > 0}


@dataclass(slots=True)
class Stats:
    """Counters since the start, and gauges of this moment (running, waiting, pages). Token counts unless said otherwise.

    Preempted work that is computed again counts again in computed_tokens, nowhere else.
    """

    running: int = 0  # requests
    waiting: int = 0  # requests
    waiting_tokens: int = 0
    queues: dict[str, Queue] = field(default_factory=dict)  # fair: what waits for its first turn, by tenant; else by ""
    in_flight: int = 0  # plans
    pages: tuple[int, ...] = ()  # per group, the null page left out
    free_pages: tuple[int, ...] = ()  # per group; those that hold known content included
    named_pages: tuple[int, ...] = ()  # per group, pages whose content is known
    steps: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0  # of requests admitted for the first time
    cached_tokens: int = 0  # of those, found in the prefix cache
    cache_queries: int = 0  # tokens looked up, at every admission
    cache_hits: int = 0  # tokens found, at every admission
    generated_tokens: int = 0
    preemptions: int = 0
    restarts: int = 0  # of the engine's process
    drafts: int = 0  # spans that carried drafts
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish reason

    @property
    def page_usage(self) -> float:
        """Share of the pages that are owned, 0 to 1, in the fullest group."""
        return max(
            (1.0 - free / total for total, free in zip(self.pages, self.free_pages, strict=True) if total), default=0.0
        )
