"""AdmissionControl: whether a request may come in now, and how long it would wait; told by what the engine was seen to do.

Knows the scheduler's figures, no request but the one that asks, no text. Used by the Engine's thread alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quire.core.stats import Queue, Stats
from quire.errors import DeadlineError, OverloadedError

WINDOW = 0.5  # seconds of work after which the pace is measured again
MEMORY = 10.0  # seconds after which an old measurement counts little
LATE = "The request's time was over before its answer was complete."


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait; None for any amount. `fair`: tenants share the engine, so each has a part of the queue."""

    requests: int | None = None
    tokens: int | None = None
    fair: bool = False


@dataclass(frozen=True, slots=True)
class _Mark:
    """The figures at one moment."""

    at: float
    computed: int


class AdmissionControl:
    """What the engine computes per second, and what follows from it for a request that comes now.

    The pace is measured in positions computed, of prompts and outputs alike, over the time in which there was work. What
    a waiting request will take is its tokens and the mean output of those before.
    """

    def __init__(self, limits: Limits) -> None:
        self.pace: float | None = None  # positions per second; None until something was measured
        self._limits = limits
        self._mark: _Mark | None = None

    @property
    def has_limits(self) -> bool:
        """Whether a request may be refused because of those that wait."""
        return self._limits.requests is not None or self._limits.tokens is not None

    def note(self, stats: Stats, now: float) -> None:
        """Take note of the figures after a step."""
        mark = self._mark
        if mark is None or stats.computed_tokens < mark.computed:
            self._mark = _Mark(now, stats.computed_tokens)
        elif now - mark.at >= WINDOW or not stats.running + stats.waiting:
            seconds, made = now - mark.at, stats.computed_tokens - mark.computed
            if made and seconds >= WINDOW:
                self._learn(made / seconds, seconds)
            # An idle engine is at no pace: the clock starts again with the next work.
            self._mark = _Mark(now, stats.computed_tokens) if stats.running + stats.waiting else None

    def _learn(self, pace: float, seconds: float) -> None:
        share = 1.0 if self.pace is None else 1.0 - math.exp(-seconds / MEMORY)
        self.pace = pace if self.pace is None else self.pace + share * (pace - self.pace)

    def wait(self, stats: Stats, tenant: str = "") -> float:
        """Seconds until a new request of the tenant has its turn; 0 where nobody waits or nothing is known."""
        if self.pace is None or not stats.waiting:
            return 0.0
        return (self._work_before(stats, tenant) + self._work(stats, Queue(1, 0))) / self.pace

    def wait_behind(self, stats: Stats, before: Queue) -> float | None:
        """Seconds until a request has its turn that has so much before it; None when the pace is not known."""
        return None if self.pace is None else self._work(stats, before.plus(1, 0)) / self.pace

    def check(self, stats: Stats, tokens: int, tenant: str = "", seconds_left: float | None = None) -> None:
        """Raise OverloadedError when no more may wait, DeadlineError when the request would have its turn too late."""
        wait = self.wait(stats, tenant)
        most, most_tokens = self._limits.requests, self._limits.tokens
        own = self._own(stats, tenant)
        if most is not None and stats.waiting >= most and own.requests >= most / self._parts(stats, tenant):
            raise OverloadedError(
                f"{stats.waiting} requests wait already, the most that may is {most}; try later", max(1.0, wait)
            )
        if (
            most_tokens is not None
            and stats.waiting_tokens + tokens > most_tokens
            and own.tokens + tokens > most_tokens / self._parts(stats, tenant)
        ):
            raise OverloadedError(
                f"{stats.waiting_tokens} prompt tokens wait already, the most that may is {most_tokens}; try later",
                max(1.0, wait),
            )
        if seconds_left is None:
            return
        if self.pace is not None:
            wait += tokens / self.pace  # its own prompt
        if wait > seconds_left:
            raise DeadlineError(
                f"The answer could not begin within the {seconds_left:.1f} s that the request allows: {stats.waiting} "
                f"requests wait, and its turn would come after about {wait:.1f} s. Allow more time, or try later",
                max(1.0, wait - seconds_left),
            )

    # ---------------------------------------------------------------- shares

    def _own(self, stats: Stats, tenant: str) -> Queue:
        """What waits of the tenant; all that waits where tenants do not count."""
        if not self._limits.fair:
            return Queue(stats.waiting, stats.waiting_tokens)
        return stats.queues.get(tenant, Queue())

    def _parts(self, stats: Stats, tenant: str) -> int:
        """Among how many the queue is shared. Each may have its part, whatever the others have taken."""
        return len({*stats.queues, tenant}) if self._limits.fair else 1

    def _work_before(self, stats: Stats, tenant: str) -> float:
        """Positions that are computed before the tenant's next request has its turn."""
        own = self._work(stats, self._own(stats, tenant))
        if not self._limits.fair:
            return own
        # Taking turns, each tenant gets as much as this one until this one's queue is empty.
        return sum(min(own, self._work(stats, queue)) for queue in stats.queues.values())

    def _work(self, stats: Stats, queue: Queue) -> float:
        """Positions that a queue will take: what is known of it, and outputs as long as others were."""
        outputs = sum(stats.finished.values()) + stats.running
        return queue.tokens + queue.requests * stats.generated_tokens / max(1, outputs)
