"""SharedCore: an EngineCore that this process shares with others; the parent process has it, see relay.py.

It has the methods of EngineCore. The journal is the parent's: when the engine dies, this side sees a pause. Knows token
ids only, no text and no engine process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from quire.core.picture import Picture
from quire.core.plan import Event
from quire.core.request import CoreRequest
from quire.core.stats import Queue, Stats
from quire.engine import wire
from quire.engine.in_transit import InTransit
from quire.engine.remote_core import TICK, OnPhase, OnTokenizer, RemoteCore
from quire.errors import EngineDeadError, EngineError, ValidationError


class SharedCore(RemoteCore):
    """One API process's view.

    `life` numbers the API processes of a server; no two have the same, a restarted one included.
    """

    def __init__(self, connection: wire.Connection[wire.FromEngine], life: int) -> None:
        super().__init__()
        self._connection = connection
        self._ticket = wire.first_ticket(life)
        self._ids: dict[int, str] = {}  # live requests by ticket
        self._tickets: dict[str, int] = {}
        self._messages: deque[wire.FromEngine] = deque()  # arrived, not yet taken in
        self._events: list[Event] = []
        self._in_transit = InTransit()
        self._stats = Stats()
        self._picture: Picture | None = None

    def start(self, on_phase: OnPhase | None = None, on_tokenizer: OnTokenizer | None = None) -> wire.Ready:
        """Wait until the engine is ready. Raises what the engine could not be started for."""
        while True:
            self._wait()
            for message in self._connection.receive():
                ready = self.heard_at_start(message, on_phase, on_tokenizer)
                if ready is not None:
                    self._stats = ready.stats
                    return ready
            if self._connection.ended:
                raise EngineError("the parent process has ended")

    # ---------------------------------------------------------------- as EngineCore

    def add(self, request: CoreRequest) -> Event | None:
        """Take in a request. Raises ValidationError or CapacityError when it could never run."""
        self.refuse(request, request.request_id in self._tickets)
        ticket = self._ticket + 1
        try:
            message = self._connection.encode(wire.add_message(ticket, request))
        except (ValueError, TypeError, OverflowError, EngineError) as error:
            raise ValidationError(f"The request cannot be passed to the engine: {error}") from error
        self._ticket = ticket
        self._ids[ticket] = request.request_id
        self._tickets[request.request_id] = ticket
        self._in_transit.sent(self._gate.queue_of(request))
        self._connection.send_encoded(message)
        return None

    def abort(self, request_id: str) -> Event | None:
        """End a request now. Returns its last event, None if it is not known."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return None
        self._forget(ticket)
        self._connection.send(wire.Abort(ticket, request_id))
        self.interrupt()  # the caller may have something to tell, too
        return Event(request_id, finish_reason="abort")

    def step(self) -> list[Event]:
        """Wait for news, an interruption or half a second; return what changed.

        Raises EngineDeadError when the engine or the parent process is lost.
        """
        if not (self._events or self._messages):
            self._wait()
        self._listen()
        events, self._events = self._events, []
        return events

    def stats(self) -> Stats:
        """Figures of the engine, which all API processes share, with this one's requests that are on their way."""
        stats = replace(self._stats)
        self._in_transit.count_in(stats)
        return stats

    def picture(self) -> Picture | None:
        """How the pages lay a moment ago; pictures come for some seconds after each call."""
        self._connection.send(wire.Look())
        return self._picture

    def close(self) -> None:
        """Leave the engine to the others. A second call changes nothing."""
        self._connection.close()
        self._wakeup.close()

    # ---------------------------------------------------------------- inside

    def _ticket_of(self, request_id: str) -> int | None:
        return self._tickets.get(request_id)

    def _ask(self, name: wire.CallName, ticket: int = 0, request_id: str = "") -> bool | Queue | None:
        number = next(self._calls)
        self._connection.send(wire.Call(number, name, ticket, request_id))
        while number not in self._answers:
            self._wait()
            self._listen()
        return self._answers.pop(number)

    def _wait(self) -> None:
        end, wakeup = self._connection.fileno(), self._wakeup.fileno()
        if wakeup in wire.wait_for([wakeup, end], [end] if self._connection.has_unsent else [], TICK):
            self._wakeup.clear()

    def _listen(self) -> None:
        self._connection.push()
        self._messages.extend(self._connection.receive())
        while self._messages:
            self._take(self._messages[0])
            self._messages.popleft()
        if self._connection.ended:
            raise EngineDeadError("The parent process has ended.")

    def _take(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Stepped):
            self._stepped(message)
        elif isinstance(message, wire.Answer):
            self._answers[message.number] = message.value
        elif isinstance(message, wire.Failed):
            raise EngineDeadError(message.message)

    def _stepped(self, message: wire.Stepped) -> None:
        """All or nothing: a message that cannot be taken in is tried again as a whole."""
        ids = self._ids
        found = [Event(ids[ticket], tokens) for ticket, tokens in message.tokens.items() if ticket in ids]
        found += [wire.event_of(ids[event.ticket], event) for event in message.events if event.ticket in ids]
        picture = None if message.picture is None else wire.named(message.picture)
        for event in message.events:
            if event.finish_reason is not None:
                self._forget(event.ticket)
        self._events += found
        self._in_transit.taken(message.taken)
        self._stats = message.stats
        self._picture = picture or self._picture

    def _forget(self, ticket: int) -> None:
        request_id = self._ids.pop(ticket, None)
        if request_id is not None:
            del self._tickets[request_id]
