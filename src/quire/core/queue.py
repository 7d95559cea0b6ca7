"""The waiting line. An order is a function from a request to a key; the smallest key goes first.

The same key decides who runs first in a step and who is preempted (the largest), so that a preempted request comes back
to the front by itself. A new order, such as a fair share per tenant, is one more function in ORDERS.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

from quire.core.request import CoreRequest, Request

Key = tuple[float, ...]


def first_come(request: CoreRequest, number: int) -> Key:
    """By arrival; `number` counts the requests and settles ties."""
    return (request.arrival, number)


def by_priority(request: CoreRequest, number: int) -> Key:
    """By priority, lower first, then by arrival."""
    return (request.priority, request.arrival, number)


def by_deadline(request: CoreRequest, number: int) -> Key:
    """Earliest deadline first; those without one last, by arrival."""
    return (math.inf if request.deadline is None else request.deadline, request.arrival, number)


ORDERS: dict[str, Callable[[CoreRequest, int], Key]] = {
    "fcfs": first_come,
    "priority": by_priority,
    "deadline": by_deadline,
}


class WaitingLine:
    """Requests that wait, smallest key first. Removal from the middle is lazy: the entry dies when it reaches the front."""

    __slots__ = ("_dead", "_heap", "tokens")

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Request]] = []
        self._dead: set[Request] = set()
        self.tokens = 0  # known tokens of all waiting requests

    def __len__(self) -> int:
        return len(self._heap) - len(self._dead)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._heap if request not in self._dead)

    def push(self, request: Request) -> None:
        """Let a request wait. It must not be in the line."""
        heapq.heappush(self._heap, (request.key, request))
        self.tokens += len(request.tokens)

    def front(self) -> Request | None:
        """The next request, without taking it."""
        while self._heap and self._heap[0][1] in self._dead:
            self._dead.discard(heapq.heappop(self._heap)[1])
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take the next request; the line must not be empty."""
        request = self.front()
        assert request is not None, "the waiting line is empty"
        heapq.heappop(self._heap)
        self.tokens -= len(request.tokens)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out of the middle, for good: the same object never comes back."""
        self._dead.add(request)
        self.tokens -= len(request.tokens)
        if len(self._dead) > 64 and 2 * len(self._dead) > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1] not in self._dead]
            heapq.heapify(self._heap)
            self._dead.clear()
