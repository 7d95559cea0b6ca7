"""Requests on their way to a scheduler in another process: what it would refuse is refused here, what it has not yet
taken in is counted here. Knows the scheduler's options, no process and no socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from quire.core.options import SchedulerOptions
from quire.core.queue import FAIR
from quire.core.request import CoreRequest
from quire.core.stats import Queue, Stats, joined
from quire.core.stop import stop_rules
from quire.core.tables import PageTables


class Gate:
    """What a scheduler with these options would say to a request."""

    def __init__(self, options: SchedulerOptions) -> None:
        self._options = options
        self._tables = PageTables(options.groups, options.max_num_batched_tokens, caching=False)  # nobody's, to count

    def refuse(self, request: CoreRequest) -> None:
        """Raise ValidationError or CapacityError for a request that could never run."""
        self._options.refuse_length(request)
        rules = stop_rules(request.params, len(request.prompt_token_ids), self._options.max_model_len)
        least = self._tables.least(rules.limit - 1, request.encoder_tokens, self._options.chunked_prefill)
        self._options.refuse_pages(request, rules.limit, least)

    def queue_of(self, request: CoreRequest) -> dict[str, Queue]:
        """A queue of nobody but this request, as the scheduler would count it."""
        name = request.tenant if self._options.policy == FAIR else ""
        return {name: Queue(1, len(request.prompt_token_ids))}


class InTransit:
    """Requests that were sent and not yet taken in, in the order in which they were sent."""

    def __init__(self) -> None:
        self._unread: deque[dict[str, Queue]] = deque()  # each as a queue
        self._queues: dict[str, Queue] = {}  # all of them together
        self._taken = 0

    def sent(self, queue: dict[str, Queue]) -> None:
        """A request is on its way."""
        self._unread.append(queue)
        self._queues = joined(self._queues, queue)

    def taken(self, count: int) -> None:
        """The other side has taken in so many by now."""
        while self._taken < count:
            less = {tenant: Queue(-queue.requests, -queue.tokens) for tenant, queue in self._unread.popleft().items()}
            self._queues = joined(self._queues, less)
            self._taken += 1

    def clear(self) -> None:
        """The other side is gone, and another one begins to count."""
        self._unread.clear()
        self._queues = {}
        self._taken = 0

    def count_in(self, stats: Stats) -> None:
        """Add them to what waits."""
        add_waiting(stats, self._queues)


def add_waiting(stats: Stats, queues: Mapping[str, Queue]) -> None:
    """Let these requests count as waiting, too."""
    if queues:
        stats.queues = joined(stats.queues, queues)
        stats.waiting += sum(queue.requests for queue in queues.values())
        stats.waiting_tokens += sum(queue.tokens for queue in queues.values())
