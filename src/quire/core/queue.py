"""The waiting line. An order is a function from a request to a key; the smallest key goes first.

The same key decides who runs first in a step and who is preempted (the largest), so that a preempted request comes back
to the front by itself. The policy "fair" serves tenants by virtual token counters: each turn goes to the tenant that has
been given least, and the number of the turn becomes the request's key. Nobody keeps a place for good: a request of the
tenant that is furthest ahead makes way for one that waits too far behind.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from quire.core.request import CoreRequest, Request
from quire.core.stats import Queue

Key = tuple[float, ...]
Entry = tuple[Key, Request]

OUTPUT_WEIGHT = 2.0  # of a token that was made, beside one of a prompt that was computed
# How far, in weighted tokens, a tenant that runs may be ahead of one that waits. As much as 256 tokens that were made:
# what making way costs, and the prefix cache does not give back, should be little beside it.
LEAD = 512.0


def first_come(request: CoreRequest, number: int) -> Key:
    """By arrival; `number` counts the requests and settles ties."""
    return (request.arrival, number)


def by_priority(request: CoreRequest, number: int) -> Key:
    """By priority, lower first, then by arrival."""
    return (request.priority, request.arrival, number)


def by_deadline(request: CoreRequest, number: int) -> Key:
    """Earliest deadline first; those without one last, by arrival."""
    return (math.inf if request.deadline is None else request.deadline, request.arrival, number)


FAIR = "fair"
ORDERS: dict[str, Callable[[CoreRequest, int], Key]] = {
    FAIR: by_priority,  # among the requests of one tenant
    "fcfs": first_come,
    "priority": by_priority,
    "deadline": by_deadline,
}


@dataclass(slots=True)
class Share:
    """One tenant: its requests that wait for their first turn, and what it has been given, in weighted tokens."""

    line: list[Entry] = field(default_factory=list)
    given: float = 0.0
    queue: Queue = Queue()  # what of the line is alive


class WaitingLine:
    """Requests that wait, in the order of a policy. Removal from the middle is lazy: the entry dies at the front.

    Unless the policy is fair, all tenants are one. There are as many shares as tenants were ever seen, which is to say
    API keys. A tenant that comes, or comes back, begins where the others are: idle time earns nothing.
    """

    __slots__ = ("_back", "_count", "_dead", "_fair", "_level", "_numbers", "_order", "_shares", "_turns", "tokens")

    def __init__(self, policy: str = "fcfs") -> None:
        self._order = ORDERS[policy]
        self._fair = policy == FAIR
        self._shares: dict[str, Share] = {}
        self._back: list[Entry] = []  # fair: those that have had their turn and lost it; they go before all others
        self._dead: set[Request] = set()
        self._numbers = 0  # requests seen
        self._turns = 0
        self._level = 0.0  # what the tenant that had the last turn had been given by then
        self._count = 0
        self.tokens = 0  # known tokens of all waiting requests

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        lines = [self._back, *(share.line for share in self._shares.values())]
        return (request for line in lines for _, request in line if request not in self._dead)

    def key_of(self, request: CoreRequest) -> Key:
        """The key of a new request."""
        self._numbers += 1
        return self._order(request, self._numbers)

    def push(self, request: Request, running: Sequence[Request] = ()) -> None:
        """Let a request wait that has had no turn yet. It must not be in the line. `running`: those that run now."""
        tenant = request.given.tenant if self._fair else ""
        share = self._shares.setdefault(tenant, Share())
        if not share.line:
            self.charge_output(running)
            others = [other.given for other in self._shares.values() if self._alive(other.line)]
            if self._fair:
                others += [self._share_of(other).given for other in running]
            share.given = max(share.given, min(others, default=self._level))
        share.queue = share.queue.plus(1, len(request.tokens))
        self._enter(share.line, request)

    def push_back(self, request: Request) -> None:
        """Let a request wait that was taken with pop() before."""
        if self._fair:
            self._enter(self._back, request)
        else:
            self.push(request)

    def step_down(self, request: Request) -> None:
        """Let a request wait that made way for another tenant's: its own tenant's next turn is its."""
        request.key = (-math.inf, *request.key)
        share = self._share_of(request)
        share.queue = share.queue.plus(1, len(request.tokens))
        self._enter(share.line, request)

    def who_makes_way(self, front: Request, running: Sequence[Request], recomputes: bool) -> Request | None:
        """The request that should wait instead of the front of the line, which has found no place: the last one of the
        tenant that is furthest ahead. None where nobody is ahead by more than LEAD, and by what would be computed again.
        """
        if not self._fair or not running or self._had_turn(front):
            return None
        self.charge_output(running)
        victim = max(reversed(running), key=self._given_to)
        bound = LEAD + (len(victim.tokens) if recomputes else 0)
        return victim if self._given_to(victim) - self._given_to(front) > bound else None

    def _given_to(self, request: Request) -> float:
        return self._share_of(request).given

    def front(self) -> Request | None:
        """The next request, without taking it."""
        line = self._next_line()
        return line[0][1] if line else None

    def pop(self) -> Request:
        """Take the next request; the line must not be empty."""
        line = self._next_line()
        assert line, "the waiting line is empty"
        _, request = heapq.heappop(line)
        self._leave(request)
        if self._fair and line is not self._back:
            self._level = self._shares[request.given.tenant].given
            self._turns += 1
            request.key = (self._turns,)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out of the middle, for good: the same object never comes back."""
        self._dead.add(request)
        self._leave(request)
        if len(self._dead) > 64 and len(self._dead) > self._count:
            for line in (self._back, *(share.line for share in self._shares.values())):
                line[:] = [entry for entry in line if entry[1] not in self._dead]
                heapq.heapify(line)
            self._dead.clear()

    def queues(self) -> dict[str, Queue]:
        """What waits for its first turn, by tenant; under the name "" unless the policy is fair."""
        return {tenant: share.queue for tenant, share in self._shares.items() if share.queue.requests}

    def in_order(self) -> Iterator[Request]:
        """All that wait, in the order of their turns if nothing came, ended or was made meanwhile."""
        yield from (request for _, request in sorted(self._back) if request not in self._dead)
        lines = [
            (share.given, number, iter([request for _, request in sorted(share.line) if request not in self._dead]))
            for number, share in enumerate(self._shares.values())
        ]
        heapq.heapify(lines)
        while lines:
            given, number, line = lines[0]
            request = next(line, None)
            if request is None:
                heapq.heappop(lines)
            else:
                heapq.heapreplace(lines, (given + len(request.tokens), number, line))
                yield request

    def charge_prompt(self, request: Request, hit: int) -> None:
        """A request runs for the first time: its tenant is given its tokens, less those found in the cache."""
        request.charged = len(request.tokens)
        self._share_of(request).given += request.charged - hit

    def charge_output(self, requests: Iterable[Request]) -> None:
        """What these requests have made since the last call is given to their tenants."""
        if not self._fair:
            return
        for request in requests:
            if request.charged and len(request.tokens) > request.charged:
                made = len(request.tokens) - request.charged
                request.charged += made
                self._share_of(request).given += OUTPUT_WEIGHT * made

    def _share_of(self, request: Request) -> Share:
        return self._shares[request.given.tenant if self._fair else ""]

    def _enter(self, line: list[Entry], request: Request) -> None:
        heapq.heappush(line, (request.key, request))
        self._count += 1
        self.tokens += len(request.tokens)

    def _leave(self, request: Request) -> None:
        if not self._had_turn(request):
            share = self._share_of(request)
            share.queue = share.queue.plus(-1, -len(request.tokens))
        self._count -= 1
        self.tokens -= len(request.tokens)

    def _had_turn(self, request: Request) -> bool:
        """Whether the key of a request is the number of its turn."""
        return self._fair and len(request.key) == 1

    def _next_line(self) -> list[Entry] | None:
        """The line whose first request is next; None when nobody waits."""
        waiting = [share for share in self._shares.values() if self._alive(share.line)]
        neediest = min(waiting, key=_given, default=None)
        back = self._back if self._alive(self._back) else None
        if neediest is None or (back is not None and self._given_to(back[0][1]) - neediest.given <= LEAD):
            return back
        return neediest.line

    def _alive(self, line: list[Entry]) -> bool:
        """Whether somebody waits in this line, whose first entry is alive then."""
        while line and line[0][1] in self._dead:
            self._dead.discard(heapq.heappop(line)[1])
        return bool(line)


def _given(share: Share) -> float:
    return share.given
