"""Supervisor: an EngineCore that lives in another process, which may die: it is started again and goes on.

It has the methods of EngineCore. Every request is in the journal until it ends; a new process is given them all, each
with the tokens that it has emitted, and continues with the same ones. Knows token ids only, no text and no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.config import EngineOptions
from quire.core.picture import Picture
from quire.core.plan import Event
from quire.core.request import CoreRequest
from quire.core.stats import Queue, Stats, joined
from quire.engine import wire
from quire.engine.child import Child, ChildProcess, came_from_outside, ending, memory_kills
from quire.engine.in_transit import InTransit, add_waiting
from quire.engine.journal import Entry, Journal
from quire.engine.remote_core import TICK, OnPhase, OnTokenizer, RemoteCore
from quire.engine.spare import Spare
from quire.engine.suspects import QUARANTINED, Cause, Suspects
from quire.engine.totals import Totals
from quire.errors import EngineDeadError, EngineError, ValidationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait and how often to try. Times in seconds."""

    silence: float = 60.0  # until an engine that says nothing counts as hung; 0: for ever
    failed_starts: int = 3  # in a row, until the engine counts as beyond repair
    vain_deaths: int = 24  # in a row without any token, the same
    first_pause: float = 0.1  # before the second restart in a row; doubled each time
    longest_pause: float = 10.0
    spare_after: float | None = 10.0  # after a start, until a spare process is made ready; None: never


class Supervisor(RemoteCore):
    """One engine process at a time."""

    def __init__(
        self,
        options: EngineOptions,
        new_process: Callable[[], Child] = ChildProcess,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.phase = "starting"  # what the engine is doing, for people: the phase of its start, "ready", "stopped"
        self.restarts = 0
        self.beside: list[wire.Connection[Any]] = []  # others that a waiting step() listens to, and returns for
        self._options = options
        self._patience = patience or Patience()
        self._clock = clock
        self._journal = Journal()
        self._suspects = Suspects(self._journal)
        self._child: Child | None = None
        self._spare = Spare(new_process, self._patience.spare_after, clock)
        self._is_up = False  # the present child takes requests
        self._running: set[int] = set()  # tickets that the present child was given
        self._in_transit = InTransit()  # those of them that it has not yet taken in
        self._early: list[Event] = []  # events that came about outside of a step
        self._totals = Totals()
        self._silent = 0.0
        self._looked = clock()
        self._failed_starts = 0
        self._vain_deaths = 0
        self._start_at = 0.0  # when to start the next child
        self._failure: wire.Failed | None = None
        self._memory_kills: int | None = None  # by the system, before the present child came up
        self._picture: Picture | None = None

    # ---------------------------------------------------------------- the first start

    def launch(self) -> None:
        """Start the process without waiting for it. A second call changes nothing."""
        if self._child is None:
            self._child = self._new_child()

    def start(self, on_phase: OnPhase | None = None, on_tokenizer: OnTokenizer | None = None) -> wire.Ready:
        """Wait for the engine's start, having launched it. Raises what the engine could not be started for."""
        self.launch()
        child = self._child
        assert child is not None, "it was launched"
        try:
            while True:
                wire.wait_for([child.connection.fileno()], [], None)
                for message in child.connection.receive():
                    ready = self.heard_at_start(message, on_phase, on_tokenizer)
                    if ready is not None:
                        self._come_up(ready)
                        return ready
                if child.connection.ended:
                    raise EngineError(_lost_at_start(child.close()))
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------- as EngineCore

    def add(self, request: CoreRequest) -> Event | None:
        """Take in a request. Raises ValidationError or CapacityError when it could never run."""
        self.refuse(request, request.request_id in self._journal)
        entry = self._journal.open(request)
        try:
            if self._is_up and self._suspects.may_run(entry):
                self._give(entry)
            elif self._child is not None:
                self._child.connection.encode(wire.add_message(entry.ticket, request))  # it must be possible later
        except Exception as error:
            self._take_back(entry)
            self._journal.close(entry)
            if isinstance(error, ValueError | TypeError | OverflowError | EngineError):
                raise ValidationError(f"The request cannot be passed to the engine: {error}") from error
            raise
        return None

    def abort(self, request_id: str) -> Event | None:
        """End a request now. Returns its last event, None if it is not known."""
        entry = self._journal.find(request_id)
        if entry is None:
            return None
        self._take_back(entry)
        self._end(entry)
        self.interrupt()  # the caller may have something to tell, too
        return Event(request_id, finish_reason="abort")

    def step(self) -> list[Event]:
        """Wait for the engine's next step, an interruption or half a second; return what changed.

        Raises EngineDeadError when the engine cannot be brought back.
        """
        if not self._early:
            self._wait(self.beside)
        self._go_on()
        events, self._early = self._early, []
        return events

    def _go_on(self) -> None:
        """Take in the news, look after the process. What cannot be taken in is asked for again, of another process."""
        try:
            self._listen()
            self._look_after()
        except EngineDeadError:
            raise
        except Exception:
            logger.exception("what the engine process sent cannot be taken in; it is ended")
            child = self._child
            if child is not None:
                child.kill()
                child.connection.close()  # what it sent is not asked for any more
                self._bury(child, "was not understood and ", crashed=True)

    def stats(self) -> Stats:
        """Counters over all engine processes; gauges as of the latest step, with the requests on their way."""
        stats = self._totals.stats
        stats.restarts = self.restarts
        held: dict[str, Queue] = {}
        if len(self._journal) > len(self._running):
            for entry in self._journal:
                if entry.ticket not in self._running:
                    held = joined(held, self._gate.queue_of(entry.request))
        add_waiting(stats, held)
        self._in_transit.count_in(stats)
        return stats

    def picture(self) -> Picture | None:
        """How the pages lay a moment ago; the engine sends pictures for some seconds after each call."""
        if self._is_up and self._child is not None:
            self._child.connection.send(wire.Look())
        return self._picture

    def _ticket_of(self, request_id: str) -> int | None:
        entry = self._journal.find(request_id)
        return entry.ticket if entry is not None and self._is_up and entry.ticket in self._running else None

    def _ask(self, name: wire.CallName, ticket: int = 0, request_id: str = "") -> bool | Queue | None:
        """An engine that dies meanwhile is followed by another."""
        number = next(self._calls)
        asked: Child | None = None
        while number not in self._answers:
            if self._is_up and self._child is not None and self._child is not asked:
                asked = self._child  # another one after a death
                asked.connection.send(wire.Call(number, name, ticket, request_id))
            self._wait()
            self._go_on()
        return self._answers.pop(number)

    def close(self) -> None:
        """End the engine process and the spare one. A second call changes nothing."""
        self.phase = "stopped"
        self._is_up = False
        if self._child is not None:
            self._child.close()
        self._child = None
        self._spare.close()
        self._wakeup.close()

    # ---------------------------------------------------------------- listening

    def _wait(self, beside: Sequence[wire.Connection[Any]] = ()) -> None:
        """Until there is something to read, of the engine or of others, or to do."""
        connections = beside if self._child is None else [self._child.connection, *beside]
        readers = [self._wakeup.fileno(), *(connection.fileno() for connection in connections)]
        writers = [connection.fileno() for connection in connections if connection.has_unsent]
        pause = TICK if self._child is not None else max(0.0, min(TICK, self._start_at - self._clock()))
        if self._wakeup.fileno() in wire.wait_for(readers, writers, pause):
            self._wakeup.clear()

    def _listen(self) -> None:
        """Take in everything that the engine has sent."""
        child = self._child
        if child is None:
            return
        child.connection.push()
        messages = child.connection.receive()
        now = self._clock()
        # Time in which this process itself did not run does not count as the engine's silence.
        self._silent = 0.0 if messages else self._silent + min(now - self._looked, 2 * TICK)
        self._looked = now
        for message in messages:
            if isinstance(message, wire.Stepped):
                self._stepped(message)
            elif isinstance(message, wire.Ready):
                self._come_up(message)
            elif isinstance(message, wire.Answer):
                self._answers[message.number] = message.value
            elif isinstance(message, wire.Phase):
                self.phase = message.name
            elif isinstance(message, wire.Failed):
                self._failure = message

    def _stepped(self, message: wire.Stepped) -> None:
        self._in_transit.taken(message.taken)
        self._totals.take(message.stats)
        if message.picture is not None:
            self._picture = wire.named(message.picture)
        for ticket, tokens in message.tokens.items():
            entry = self._journal.get(ticket)
            if entry is not None and ticket in self._running:
                self._early.append(entry.take(Event(entry.request.request_id, tokens)))
                if self._suspects.searching:
                    self._cleared(entry)
        for found in message.events:
            entry = self._journal.get(found.ticket)
            if entry is not None and found.ticket in self._running:
                event = wire.event_of(entry.request.request_id, found)
                self._early.append(entry.take(event))
                if event.finish_reason is not None:
                    self._running.discard(entry.ticket)
                    self._end(entry)
                elif event.tokens and self._suspects.searching:
                    self._cleared(entry)
        if message.tokens or message.events:
            self._vain_deaths = 0

    def _cleared(self, entry: Entry) -> None:
        """A request that got a token is not to blame for anything. It makes way while others are to be tried."""
        others_may_run = self._suspects.acquit(entry)
        if self._suspects.searching:
            self._take_back(entry)
            self._journal.renew(entry)
        if others_may_run:
            self._give_all()

    def _end(self, entry: Entry) -> None:
        self._journal.close(entry)
        if self._suspects.acquit(entry):
            self._give_all()

    # ---------------------------------------------------------------- requests and the present process

    def _give(self, entry: Entry) -> None:
        """Send a request to the engine."""
        assert self._child is not None, "there is a child when it is up"
        message = self._child.connection.encode(wire.add_message(entry.ticket, entry.request, entry.emitted))
        self._running.add(entry.ticket)
        self._in_transit.sent(self._gate.queue_of(entry.request))
        self._child.connection.send_encoded(message)

    def _take_back(self, entry: Entry) -> None:
        """The engine shall not go on with a request."""
        if entry.ticket in self._running:
            self._running.discard(entry.ticket)
            if self._is_up and self._child is not None:
                self._child.connection.send(wire.Abort(entry.ticket, entry.request.request_id))

    def _come_up(self, ready: wire.Ready) -> None:
        """The engine takes requests: give it all that may run."""
        self.phase = "ready"
        self._is_up = True
        self._failed_starts = 0
        self._memory_kills = memory_kills()
        self._silent, self._looked = 0.0, self._clock()
        self._spare.due(after_death=self.restarts > 0)
        self._totals.take(ready.stats)
        self._give_all()

    def _give_all(self) -> None:
        """Give the engine, if it is there, everything that may run and does not yet."""
        if not self._is_up:
            return
        for entry in self._journal:
            if entry.ticket not in self._running and self._suspects.may_run(entry):
                self._give(entry)

    # ---------------------------------------------------------------- life and death

    def _look_after(self) -> None:
        """Notice a death or a standstill; start the next process when it is time."""
        child = self._child
        if child is None:
            if self._clock() >= self._start_at:
                self._start_again()
        elif child.connection.ended:
            self._bury(child, "")
        elif self._is_up and 0 < self._patience.silence <= self._silent:
            logger.error("the engine process %d has said nothing for %.1f s; it is ended", child.pid, self._silent)
            child.kill()
            self._bury(child, "said nothing and ", crashed=True)
        elif self._is_up:
            self._spare.prepare()

    def _start_again(self) -> None:
        self.restarts += 1
        self.phase = "starting"
        self._failure = None
        try:
            self._child = self._new_child()
        except EngineError as error:
            self._count_failed_start(str(error))

    def _new_child(self) -> Child:
        """The next process, told what to load."""
        child = self._spare.take()
        child.begin(self._options)
        return child

    def _bury(self, child: Child, how: str, crashed: bool = False) -> None:
        """The engine process is gone: everything that it sent is taken in, everything else will be done again.

        `crashed`: it was ended from here for what it did, so that its status tells nothing.
        """
        while not child.connection.ended:
            self._listen()
        was_up, self._is_up = self._is_up, False
        in_flight = child.box.in_flight()
        self._child = None
        status = child.close()
        how += ending(status)
        self.phase = "restarting"
        self._totals.bury()
        self._in_transit.clear()
        self._running.clear()
        if not was_up:
            self._count_failed_start(how if self._failure is None else self._failure.message)
            return
        for entry in self._journal:
            entry.restart()
        self._vain_deaths += 1
        culprit = self._suspects.died(in_flight, Cause.CRASH if crashed else self._cause(status))
        if culprit is not None:
            self._quarantine(culprit)
        if self._vain_deaths > self._patience.vain_deaths:
            self._give_up(f"it died {self._vain_deaths} times without any token in between, the last time it {how}")
        # Where each death brings the search further, waiting helps nobody.
        pause = self._pause(min(self._vain_deaths, 2) if self._suspects.searching else self._vain_deaths)
        self._start_at = self._clock() + pause
        logger.error(
            "the engine process %d %s; %d requests go on in a new one%s",
            child.pid,
            how,
            len(self._journal),
            f", in {pause:.1f} s" if pause else "",
        )

    def _cause(self, status: int) -> Cause:
        """Why the process ended by itself. Where the system does not tell of its own kills, each may have been one."""
        if not came_from_outside(status):
            return Cause.CRASH
        was_somebody = self._memory_kills is not None and self._memory_kills == memory_kills()
        return Cause.KILL if was_somebody else Cause.SHORTAGE

    def _quarantine(self, entry: Entry) -> None:
        logger.error("request %s ended the engine, at last alone; it is ended", entry.request.request_id)
        self._vain_deaths = 1  # the others have not been tried without it
        self._early.append(Event(entry.request.request_id, finish_reason="error", error=QUARANTINED))
        self._end(entry)

    def _count_failed_start(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= self._patience.failed_starts:
            self._give_up(f"it could not be started {self._failed_starts} times in a row; the last time: {how}")
        pause = self._pause(self._failed_starts + 1)
        logger.error("the engine process could not be started (%s); the next try comes in %.1f s", how, pause)
        self._start_at = self._clock() + pause

    def _pause(self, times: int) -> float:
        if times <= 1:
            return 0.0
        return min(self._patience.longest_pause, self._patience.first_pause * 2 ** (times - 2))

    def _give_up(self, why: str) -> None:
        self.phase = "stopped"
        raise EngineDeadError(f"The engine is beyond repair: {why}.")


def _lost_at_start(status: int) -> str:
    """What is said of an engine process that ended before it was ready, without a word of its own."""
    hint = " Where memory ran out: `quire plan` tells what the model takes." if came_from_outside(status) else ""
    return f"the engine process {ending(status)} while it was starting.{hint}"
