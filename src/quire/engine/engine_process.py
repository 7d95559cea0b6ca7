"""The engine process: `python -m quire.engine.engine_process SOCKET MEMORY`, two inherited file descriptors.

It loads the model that the first message names, takes messages between steps and sends what a step brought in one message.
It ends with its API process, at once. Signals that end a server are left to that process, which drains.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quire import env
from quire.config import EngineOptions
from quire.core.options import SchedulerOptions
from quire.core.picture import Ceiling, Picture
from quire.core.plan import Event, StepPlan, StepResult
from quire.core.scheduler import Scheduler
from quire.core.stats import Stats
from quire.engine import prefetch, wire
from quire.engine.blackbox import REGIONS, BlackBox
from quire.engine.core import EngineCore
from quire.engine.engine import EngineSettings
from quire.engine.executor import Executor, Handle
from quire.engine.heap import keep_for_good, uncollected
from quire.engine.orphan import end_with, leave_signals_to_parent
from quire.engine.remote_core import LOOK_SECONDS, PICTURE_SECONDS, answered
from quire.grammar import Grammars

logger = logging.getLogger(__name__)

# Lone tokens wait so long at most for those of the next steps: no screen shows them sooner, and each wake-up of an API
# process takes more from the kernels' threads than another token in it does.
GATHER_SECONDS = 0.016
BEAT_SECONDS = 1.0  # an idle engine says so often that it lives
GRAMMAR_SECONDS = 0.005  # an idle engine looks so often whether a grammar is compiled


@dataclass(frozen=True, slots=True)
class Served:
    """What a loader brings: an executor with its model loaded, and how to drive it."""

    executor: Executor
    scheduler: SchedulerOptions
    settings: EngineSettings
    grammars: Grammars | None = None
    ceiling: Callable[[], Ceiling] | None = None  # measures for a moment what the machine allows the model


Tell = Callable[[wire.FromEngine], None]
Load = Callable[[EngineOptions, Tell], Served]


def main(arguments: Sequence[str]) -> int:
    """Run the engine process over real models."""
    env.set_up_logging()
    return run(load_model, arguments, import_heavy)


def import_heavy() -> None:
    """Import what every model needs, before it is known which one is to be loaded: torch above all."""
    with uncollected():
        import quire.engine.start  # noqa: F401


def load_model(options: EngineOptions, tell: Tell) -> Served:
    """Load what the options name; tells each phase, and where the tokenizer is as soon as that is known."""
    # Imported here: torch comes with it, and the tests' engines need none.
    from quire.engine.start import load
    from quire.resolve import EngineConfig
    from quire.roofline import ceiling_of

    ceilings: list[Callable[[], Ceiling]] = []

    def on_config(config: EngineConfig) -> None:
        ceilings.append(lambda: ceiling_of(config))
        files = config.files
        if not options.model.skip_tokenizer_init:
            tell(wire.Tokenizing(str(files.tokenizer), files.trust_remote_code, files.tokenizer_revision))

    loaded = load(options, lambda name, seconds: tell(wire.Phase(name, seconds)), on_config)
    return Served(loaded.executor, loaded.scheduler, loaded.settings, loaded.grammars, *ceilings)


def run(load: Load, arguments: Sequence[str], prepare: Callable[[], None] | None = None) -> int:
    """The life of the process: prepare, wait to be told what to load, load it, serve until the other end is closed.

    Returns 0 then, 1 when the model cannot be loaded.
    """
    leave_signals_to_parent()
    end, memory = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    connection: wire.Connection[wire.ToEngine] = wire.Connection(end, wire.ToEngine)
    end_with(end.fileno())
    box = BlackBox(memory)
    os.close(memory)

    return live(load, connection, box, prepare)


def live(
    load: Load,
    connection: wire.Connection[wire.ToEngine],
    box: BlackBox,
    prepare: Callable[[], None] | None = None,
) -> int:
    """What run() does behind its descriptors. Raises whatever makes going on impossible."""

    def tell(message: wire.FromEngine) -> None:
        connection.send(message)
        connection.flush()

    messages: list[wire.ToEngine] = []

    def listen() -> None:
        messages.extend(_wait(connection, None))
        if messages and isinstance(messages[0], wire.Start):
            prefetch.begin(messages[0].options)

    since = time.perf_counter()
    listener = threading.Thread(target=listen, name="first message", daemon=True)
    listener.start()
    if prepare is not None:
        prepare()
    prepared = time.perf_counter() - since
    listener.join()
    if not messages:
        return 0
    first = messages[0]
    assert isinstance(first, wire.Start), "the API process sends the options first"
    tell(wire.Phase("importing torch", prepared))
    try:
        served = load(first.options, tell)
    except Exception as error:
        logger.debug("the start failed", exc_info=error)
        tell(wire.Failed(type(error).__name__, str(error)))
        return 1
    executor = NotedExecutor(served.executor, box)
    core = EngineCore(Scheduler(served.scheduler), executor, served.scheduler.max_in_flight, mortal=True)
    keep_for_good()
    tell(wire.Ready(served.scheduler, served.settings, core.stats()))
    EngineLoop(core, executor, connection, served.grammars, served.ceiling).serve(messages[1:])
    return 0


def _wait(connection: wire.Connection[wire.ToEngine], seconds: float | None) -> list[wire.ToEngine]:
    """Messages as soon as there are any; none after `seconds` or when the other end is closed."""
    messages = connection.receive()
    while not messages and not connection.ended:
        if not wire.wait_for([connection.fileno()], [], seconds):
            return []
        messages = connection.receive()
    return messages


class EngineLoop:
    """Messages in, steps, events out. A request whose grammar is not compiled yet waits, and the steps do not."""

    def __init__(
        self,
        core: EngineCore,
        executor: NotedExecutor,
        connection: wire.Connection[wire.ToEngine],
        grammars: Grammars | None = None,
        ceiling: Callable[[], Ceiling] | None = None,
    ) -> None:
        self._core = core
        self._executor = executor
        self._connection = connection
        self._grammars = grammars
        self._waiting: list[wire.Add] = []
        self._taken = 0
        self._told_at = 0.0
        self._watched_until = 0.0
        self._picture_at = 0.0
        self._measure = ceiling  # until it has been measured
        self._ceiling: Ceiling | None = None

    def serve(self, messages: Sequence[wire.ToEngine] = ()) -> None:
        """Until the other end is closed."""
        unsent: list[Event] = []
        while not self._connection.ended:
            events: list[Event] = []
            waiting, self._waiting = self._waiting, []
            for held in waiting:
                self._add(held, events)
            for message in messages:
                self._take(message, events)
            if self._core.has_work():
                events += self._core.step()
                self._executor.settle()
            unsent += events
            messages = self._connection.receive()
            stats = self._core.stats()
            if messages or not self._may_gather(events, stats):
                self._connection.send(wire.step_message(self._taken, unsent, stats, self._picture()))
                self._connection.flush()
                self._told_at, unsent = time.monotonic(), []
            if not messages and not self._core.has_work():
                messages = _wait(self._connection, GRAMMAR_SECONDS if self._waiting else BEAT_SECONDS)

    def _may_gather(self, events: list[Event], stats: Stats) -> bool:
        """Whether the events of a step may wait for those of the next one: tokens alone, of each request that there is, so
        that the next step will be as short as this one was."""
        if self._waiting or time.monotonic() - self._told_at >= GATHER_SECONDS:
            return False
        return 0 < len(events) == stats.running and not stats.waiting and all(map(wire.brings_only_tokens, events))

    def _take(self, message: wire.ToEngine, events: list[Event]) -> None:
        if isinstance(message, wire.Add):
            self._taken += 1
            self._add(message, events)
        elif isinstance(message, wire.Abort):
            self._waiting = [held for held in self._waiting if held.ticket != message.ticket]
            self._core.abort(wire.core_id(message.ticket, message.request_id))
        elif isinstance(message, wire.Call):
            self._connection.send(answered(self._core, message))
        elif isinstance(message, wire.Look):
            self._watched_until = time.monotonic() + LOOK_SECONDS

    def _picture(self) -> Picture | None:
        """How the pages lie, now and then, while somebody looks."""
        now = time.monotonic()
        if now > self._watched_until or now < self._picture_at:
            return None
        self._picture_at = now + PICTURE_SECONDS
        if self._measure is not None and not self._core.has_work():
            measure, self._measure = self._measure, None
            self._ceiling = measure()
        return replace(self._core.picture(), ceiling=self._ceiling)

    def _add(self, message: wire.Add, events: list[Event]) -> None:
        """A request that cannot be taken in fails alone. One that has ended already says so at once."""
        form = message.sampling and message.sampling.structured_outputs
        if form and self._grammars is not None and not self._grammars.ready(form):
            self._waiting.append(message)
            return
        try:
            last = self._core.add(wire.core_request(message))
        except Exception as error:
            last = Event(
                wire.core_id(message.ticket, message.request_id),
                finish_reason="error",
                error=f"{type(error).__name__}: {error}",
            )
        if last is not None:
            events.append(last)


class NotedExecutor:
    """An executor that notes in the black box what each plan computes, before it is begun."""

    def __init__(self, inner: Executor, box: BlackBox) -> None:
        self._inner = inner
        self._box = box
        self._rows: dict[int, int] = {}  # slot -> ticket
        self._done: list[int] = []

    def submit(self, plan: StepPlan) -> Handle:
        """Note, then pass on."""
        rows = self._rows
        for new in plan.admitted:
            rows[new.slot] = wire.ticket_of(new.request_id)
        self._box.note(plan.step, [rows[span.slot] for span in plan.spans])
        return _NotedHandle(self._inner.submit(plan), plan.step, self._done)

    def settle(self) -> None:
        """The plans that were collected are applied, too: nobody is to blame for them any more."""
        for step in self._done:
            self._box.clear(step)
        self._done.clear()

    def call(self, method: str, *args: Any) -> Any:
        """As the inner executor does."""
        return self._inner.call(method, *args)

    def close(self) -> None:
        """As the inner executor does."""
        self._inner.close()


@dataclass(slots=True)
class _NotedHandle:
    inner: Handle
    step: int
    done: list[int]

    def result(self) -> StepResult:
        """The result; from now on the plan is only to be applied."""
        try:
            return self.inner.result()
        finally:
            self.done.append(self.step)


assert REGIONS > 2, "two plans may be in flight"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
