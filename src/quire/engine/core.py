"""EngineCore: takes requests in, schedules, submits, applies. Token ids only.

Up to `max_in_flight` plans are with the executor while the next one is made. Knows neither text nor tensors; the
scheduler decides, the executor computes, this file only carries.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Protocol

from quire.core.picture import Picture
from quire.core.plan import Event, SpanResult, StepPlan, StepResult
from quire.core.request import CoreRequest
from quire.core.scheduler import Scheduler
from quire.core.stats import Queue, Stats
from quire.engine.executor import Executor, Handle
from quire.errors import EngineDeadError, EngineError

logger = logging.getLogger(__name__)


class Core(Protocol):
    """What an Engine drives: the EngineCore of this file, or one in another process (supervisor.py).

    `resumable`: whether step() may be called again after it has raised anything but EngineDeadError.
    """

    resumable: bool

    def add(self, request: CoreRequest) -> Event | None:
        """Take in a request; its last event if it has ended already."""
        ...

    def abort(self, request_id: str) -> Event | None:
        """End a request now."""
        ...

    def has_work(self) -> bool:
        """Whether step() should be called."""
        ...

    def step(self) -> list[Event]:
        """What changed since the last call, waiting for it where that makes sense."""
        ...

    def interrupt(self) -> None:
        """Let a step that waits in another thread return."""
        ...

    def stats(self) -> Stats:
        """Counters and gauges."""
        ...

    def before(self, request_id: str) -> Queue | None:
        """What has its turn before a request that waits; None for one that does not."""
        ...

    def picture(self) -> Picture | None:
        """How the pages lie, now or a moment ago; None while that is not known."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget all cached pages."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class EngineCore:
    """The loop over one scheduler and one executor. Not thread-safe: one thread calls it.

    `mortal`: somebody starts the engine anew and gives it all requests again, so a step that fails as a whole raises.
    Otherwise it ends the requests that were in it.
    """

    resumable = False  # who knows how far the scheduler came

    def __init__(self, scheduler: Scheduler, executor: Executor, max_in_flight: int = 1, mortal: bool = False) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._max_in_flight = max_in_flight
        self._mortal = mortal
        self._in_flight: deque[tuple[StepPlan, Handle]] = deque()
        self._broken_off = False

    def add(self, request: CoreRequest) -> Event | None:
        """Queue a request. Returns its last event if what it has `generated` ends it already.

        Raises ValidationError or CapacityError when it could never run.
        """
        return self._scheduler.add(request)

    def abort(self, request_id: str) -> Event | None:
        """End a request now, at any moment of its life. Returns its last event, None if it is not known."""
        return self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether step() would do anything."""
        return bool(self._in_flight) or self._scheduler.has_work()

    def step(self) -> list[Event]:
        """Fill the executor with plans, wait for the oldest, and return what it changed.

        One that is broken off in its middle, as by KeyboardInterrupt, was the last: raises EngineDeadError from then on.
        """
        if self._broken_off:
            raise EngineDeadError("A step was broken off in its middle, so the engine cannot go on. Make a new one.")
        try:
            return self._step()
        except Exception:
            raise
        except BaseException:
            self._broken_off = True
            raise

    def _step(self) -> list[Event]:
        while len(self._in_flight) < self._max_in_flight:
            plan = self._scheduler.schedule()
            if plan is None:
                break
            self._in_flight.append((plan, self._submit(plan)))
        if not self._in_flight:
            return []
        plan, handle = self._in_flight.popleft()
        return self._scheduler.apply(plan, self._collect(plan, handle))

    def interrupt(self) -> None:
        """A step in this process ends by itself; there is nothing to wake."""

    def _submit(self, plan: StepPlan) -> Handle:
        try:
            return self._executor.submit(plan)
        except Exception as error:  # the executor's own failure: this plan fails, the engine goes on
            return _Failed(error)

    def _collect(self, plan: StepPlan, handle: Handle) -> StepResult:
        """The result of the plan. A step that failed as a whole fails the requests in it and nobody else, or raises.

        A worker already runs the requests of a failed step one by one to find the culprit, so what arrives here as an
        exception is beyond one request: the executor itself.
        """
        try:
            result = handle.result()
            if result.step != plan.step or len(result.spans) != len(plan.spans):
                raise EngineError(f"the result of step {result.step} has {len(result.spans)} entries")
            return result
        except Exception as error:
            if self._mortal:
                raise
            logger.exception("step %d failed; its %d requests end with an error", plan.step, len(plan.spans))
            message = f"the step failed: {type(error).__name__}: {error}"
            return StepResult(plan.step, tuple(SpanResult(span.slot, error=message) for span in plan.spans))

    def stats(self) -> Stats:
        """Counters of the scheduler."""
        return self._scheduler.stats()

    def picture(self) -> Picture:
        """How the pages lie now."""
        return self._scheduler.picture()

    def before(self, request_id: str) -> Queue | None:
        """What has its turn before a request that waits; None for one that does not."""
        return self._scheduler.before(request_id)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached pages. False when requests still hold some."""
        return self._scheduler.reset_prefix_cache()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the workers; see Executor.call."""
        return self._executor.call(method, *args)

    def close(self) -> None:
        """Wait for the plans in flight and close the executor."""
        while self._in_flight:
            plan, handle = self._in_flight.popleft()
            self._scheduler.apply(plan, self._collect(plan, handle))
        self._executor.close()


class _Failed:
    """The handle of a plan that could not even be submitted."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        """Raise what the executor raised."""
        raise self._error
