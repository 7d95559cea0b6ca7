"""Progress: health told by what the engine does, never by the fact that its thread exists.

An observer of the engine's steps, and the states that follow from them. Knows no route and no request's content.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.core.stats import Stats
from quire.engine.observe import Observer, StepFigures


@dataclass(slots=True)
class Progress:
    """Called after each step; `then` is told, too. Its fields are read from other threads, each on its own."""

    then: Observer | None = None
    clock: Callable[[], float] = time.monotonic
    stats: Stats = field(default_factory=Stats)
    steps: int = 0  # that were told of, which may be fewer than the engine made
    rows: int = 0  # running requests, added up over these
    last_step: float | None = None
    last_token: float | None = None

    def observe(self, stats: Stats, figures: StepFigures) -> None:
        """Take note of a step, in the engine's thread."""
        now = self.clock()
        if stats.generated_tokens > self.stats.generated_tokens:
            self.last_token = now
        self.stats = stats
        self.steps += 1
        self.rows += stats.running
        self.last_step = now
        if self.then is not None:
            self.then.observe(stats, figures)

    def silent_for(self, busy_since: float | None) -> float:
        """Seconds without a step although there was work since `busy_since`; 0 when there is none."""
        if busy_since is None:
            return 0.0
        return max(0.0, self.clock() - max(busy_since, self.last_step or 0.0))

    def report(self) -> dict[str, object]:
        """What /livez and /readyz tell besides their state."""
        now = self.clock()
        return {
            "steps": self.stats.steps,
            "generated_tokens": self.stats.generated_tokens,
            "seconds_since_step": None if self.last_step is None else round(now - self.last_step, 3),
            "seconds_since_token": None if self.last_token is None else round(now - self.last_token, 3),
            "running": self.stats.running,
            "waiting": self.stats.waiting,
        }
