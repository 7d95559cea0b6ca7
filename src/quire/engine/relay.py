"""Relay: one supervised engine for several API processes. In the parent process, between them and the Supervisor.

To an API process it speaks as an engine process does, so messages are those of wire.py. The Supervisor's journal holds
the requests of all, so an engine that dies is followed by another one without their knowing, and blame is told as
for one. Starts and ends nothing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from quire.core.plan import Event
from quire.core.stats import Stats
from quire.engine import wire
from quire.engine.remote_core import LOOK_SECONDS, PICTURE_SECONDS, answered
from quire.engine.supervisor import Supervisor
from quire.errors import EngineDeadError

logger = logging.getLogger(__name__)

BEAT = 0.25  # seconds after which an API process without news of its own is told the figures again


@dataclass(slots=True, eq=False)
class Line:
    """One API process as its engine sees it."""

    life: int
    connection: wire.Connection[wire.ToEngine]
    live: set[str] = field(default_factory=set)  # its requests, by their ids in the journal
    taken: int = 0
    owed: bool = False  # it has to be told how many were taken
    events: list[Event] = field(default_factory=list)
    told: Stats = field(default_factory=Stats)
    told_at: float = 0.0
    watched_until: float = 0.0
    pictured_at: float = 0.0


class Relay:
    """One thread uses it, that of the Supervisor."""

    def __init__(self, supervisor: Supervisor, clock: Callable[[], float] = time.monotonic) -> None:
        self._supervisor = supervisor
        self._clock = clock
        self._lines: dict[int, Line] = {}
        self._tokenizing: wire.Tokenizing | None = None
        self._ready: wire.Ready | None = None

    # ---------------------------------------------------------------- the start

    def start(self) -> None:
        """Wait for the engine; the API processes hear of it. Raises what it could not be started for."""
        self._ready = self._supervisor.start(self._phase, self._found_tokenizer)
        for line in self._lines.values():
            line.connection.send(_ready_for(self._ready, line.life))

    def _phase(self, name: str, seconds: float | None) -> None:
        for line in self._lines.values():
            line.connection.send(wire.Phase(name, seconds))

    def _found_tokenizer(self, found: wire.Tokenizing) -> None:
        self._tokenizing = found
        for line in self._lines.values():
            line.connection.send(found)

    # ---------------------------------------------------------------- who is there

    def join(self, life: int, connection: wire.Connection[wire.ToEngine]) -> None:
        """An API process begins; `life` is its number."""
        self._lines[life] = Line(life, connection)
        self._supervisor.beside.append(connection)
        if self._tokenizing is not None:
            connection.send(self._tokenizing)
        if self._ready is not None:
            connection.send(_ready_for(self._ready, life))

    def leave(self, life: int) -> None:
        """An API process is gone: its requests end. A second call changes nothing."""
        line = self._lines.pop(life, None)
        if line is None:
            return
        self._supervisor.beside.remove(line.connection)
        line.connection.close()
        for request_id in line.live:
            self._supervisor.abort(request_id)

    # ---------------------------------------------------------------- steps

    def step(self) -> None:
        """Wait for news of any side, and pass them on. Raises EngineDeadError when the engine cannot be brought back."""
        try:
            self._route(self._supervisor.step())
            for line in list(self._lines.values()):
                self._hear(line)
        except EngineDeadError as error:
            for line in self._lines.values():
                line.connection.send(wire.Failed(type(error).__name__, str(error)))
            raise
        stats = self._supervisor.stats()
        for line in self._lines.values():
            self._tell(line, stats)

    def _route(self, events: list[Event]) -> None:
        for event in events:
            line = self._lines.get(wire.life_of(wire.ticket_of(event.request_id)))
            if line is not None:
                line.events.append(event)
                if event.finish_reason is not None:
                    line.live.discard(event.request_id)

    def _hear(self, line: Line) -> None:
        """Take in what an API process asks for. One that cannot be understood is cut off, which ends it."""
        try:
            line.connection.push()
            for message in line.connection.receive():
                self._take(line, message)
        except EngineDeadError:
            raise
        except Exception:
            logger.exception("what API process %d sent cannot be taken in; it is cut off", line.life)
            self.leave(line.life)
            return
        if line.connection.ended:
            self.leave(line.life)

    def _take(self, line: Line, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Add):
            line.taken += 1
            line.owed = True
            self._add(line, message)
        elif isinstance(message, wire.Abort):
            request_id = wire.core_id(message.ticket, message.request_id)
            line.live.discard(request_id)
            self._supervisor.abort(request_id)
        elif isinstance(message, wire.Call):
            line.connection.send(answered(self._supervisor, message))
        elif isinstance(message, wire.Look):
            line.watched_until = self._clock() + LOOK_SECONDS

    def _add(self, line: Line, message: wire.Add) -> None:
        """A request that cannot be taken in fails alone."""
        request = wire.core_request(message)
        try:
            self._supervisor.add(request)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            line.events.append(Event(request.request_id, finish_reason="error", error=told))
        else:
            line.live.add(request.request_id)

    def _tell(self, line: Line, stats: Stats) -> None:
        """Send an API process its events; without any, only what limits depend on, and now and then the rest."""
        now = self._clock()
        news = line.events or line.owed or stats.queues != line.told.queues or stats.waiting != line.told.waiting
        if not news and now - line.told_at < BEAT:
            return
        picture = None
        if now < line.watched_until and now - line.pictured_at >= PICTURE_SECONDS:
            line.pictured_at = now
            picture = self._supervisor.picture()
        line.connection.send(wire.step_message(line.taken, line.events, stats, picture))
        line.events, line.owed = [], False
        line.told, line.told_at = stats, now


def _ready_for(ready: wire.Ready, life: int) -> wire.Ready:
    """What an API process is told, with a seed of its own: two of them must not draw the same ones for requests."""
    text = f"{ready.settings.seed}:{life}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
    return wire.Ready(ready.scheduler, replace(ready.settings, seed=seed), ready.stats)
