"""Live: the requests that are being answered, by the ids that clients know, and why each of them waits.

Plain data, changed in the event loop. Knows no engine and no route.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import ref

from quire.core.stats import Stats
from quire.engine.engine import Place

FEW = 64  # requests that are over and may stay in the list
FULL = 0.95  # share of the pages from which on they are what is missing


@dataclass(slots=True, eq=False, weakref_slot=True)
class LiveRequest:
    """One request on its way."""

    id: str
    tenant: str
    prompts: int
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    first_output: float | None = None
    output_tokens: int = 0
    engine_ids: set[str] = field(default_factory=set)
    over: bool = False  # set by whoever answers it, at its end: a plain store, which cannot fail

    def note(self, tokens: int) -> None:
        """Something came; there are so many tokens now."""
        if self.first_output is None:
            self.first_output = time.monotonic()
        self.output_tokens = tokens


@dataclass(slots=True)
class Live:
    """All of them, in the order of their arrival. Those that are over are swept out when there are many.

    Whoever answers a request owns it: one whose owner is gone without a word is over, too.
    """

    _requests: list[ref[LiveRequest]] = field(default_factory=list)
    _most: int = FEW  # entries from which on they are swept

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[LiveRequest]:
        found = (held() for held in self._requests)
        return (request for request in found if request is not None and not request.over)

    def add(self, request: LiveRequest) -> None:
        """A request begins. Of two with one id, only the later one can be asked about."""
        if len(self._requests) >= self._most:
            self._requests = [ref(request) for request in self]
            self._most = 2 * len(self._requests) + FEW
        self._requests.append(ref(request))

    @property
    def busy_since(self) -> float | None:
        """When the oldest of them began; None when there is none."""
        oldest = next(iter(self), None)
        return None if oldest is None else oldest.began

    def find(self, name: str, tenant: str) -> LiveRequest | None:
        """The tenant's request with this id; the part behind the prefix, as in X-Request-Id, is enough."""
        for request in reversed(list(self)):
            if request.tenant == tenant and name in (request.id, request.id.partition("-")[2]):
                return request
        return None

    def engine_ids(self) -> list[str]:
        """The engine's ids of everything that runs."""
        return [engine_id for request in self for engine_id in request.engine_ids]

    def describe(self, request: LiveRequest, stats: Stats, place: Place | None) -> dict[str, object]:
        """What it is doing; `place` is its place in the queue, where it waits."""
        now = time.monotonic()
        return {
            "id": request.id,
            "object": "request",
            "created": request.created,
            "state": "waiting" if place else "prefill" if request.first_output is None else "decode",
            "queue_position": None if place is None else place.number,
            "estimated_wait_seconds": None if place is None or place.wait is None else round(place.wait, 3),
            "why": _why(place, request, stats),
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
            "seconds": round(now - request.began, 3),
            "seconds_to_first_token": None
            if request.first_output is None
            else round(request.first_output - request.began, 3),
        }


def _why(place: Place | None, request: LiveRequest, stats: Stats) -> str:
    if request.first_output is not None:
        return f"It is being answered, beside {max(0, stats.running - 1)} others."
    if place is None:
        return f"Its prompt is being computed, beside {max(0, stats.running - 1)} other requests."
    if stats.page_usage >= FULL:
        return f"It waits for room in the cache: {stats.running} running requests hold {stats.page_usage:.0%} of it."
    return f"It waits for one of {stats.running} running requests to end; {place.number - 1} are before it."
