"""run_api_processes: the parent of several API processes: it has their engine, starts them, and starts again what dies.

Every process listens on the socket that its seat inherits; what waits there when it dies is its successor's. The parent
answers no client: it carries messages between them and the engine (engine/relay.py), and between each other
(neighbours.py). What dies takes its own connections along and nobody else's; its requests end in the engine.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from quire.engine import wire
from quire.engine.child import ending
from quire.engine.relay import Relay
from quire.engine.supervisor import Supervisor
from quire.engine.tallies import Tallies, total
from quire.env import announce
from quire.errors import EngineDeadError
from quire.serve.listen import one_for_each
from quire.serve.neighbours import Begin, Note, Question, Reply, Stop, Sum, SumWanted, ToParent, Up
from quire.serve.setup import Setup

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "quire.serve.api_process")  # -P: no module comes from the working folder
LATE_SECONDS = 10.0  # beyond the time for draining, until an API process that does not end is killed
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before the second restart of a place in a row; doubled each time
LONG_LIFE = 30.0  # seconds after which a death is no longer one in a row
LONGEST_LOOK = 1.0  # seconds between two looks; what is beyond, this process did not run


@dataclass(slots=True, eq=False)
class ApiProcess:
    """One API process. `life` is its number."""

    life: int
    process: subprocess.Popen[bytes]
    connection: wire.Connection[ToParent]
    began: float
    lines: list[str] | None = None  # what it wants printed; None until it is up
    silent: float = 0.0  # seconds since it said something
    note: Note = field(default_factory=lambda: Note({}, 0))


@dataclass(slots=True)
class Seat:
    """One of so many API processes that there shall be; who dies is followed by another one, on the same socket."""

    listener: socket.socket
    api: ApiProcess | None = None
    deaths: int = 0  # in a row
    start_at: float = 0.0


@dataclass(slots=True)
class Asked:
    """A question that is with the others. `left`: who has not answered."""

    asker: ApiProcess
    question: Question
    left: set[int]
    found: list[object] = field(default_factory=list)


def run_api_processes(setup: Setup) -> int:
    """Serve until told to stop. Returns the exit status; raises what the engine could not be started for."""
    processes = ApiProcesses(setup, one_for_each(setup.listener, setup.serve.api_server_count))
    before = {number: signal.signal(number, processes.told_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return processes.run()
    finally:
        processes.close()
        for number, handler in before.items():
            signal.signal(number, handler)


class ApiProcesses:
    """All API processes of a server, one for each listening socket, and their engine. One thread uses it."""

    def __init__(self, setup: Setup, listeners: Sequence[socket.socket]) -> None:
        self._setup = setup
        self._supervisor = Supervisor(setup.engine, setup.processes, setup.patience)
        self._relay = Relay(self._supervisor)
        self._seats = [Seat(listener) for listener in listeners]
        self._lives = 0
        self._signals = 0  # that told the server to stop
        self._heeded = 0
        self._kill_at = float("inf")
        self._is_ready = False
        self._has_greeted = False
        self._looked = time.monotonic()
        self._past: Tallies = {}  # counts of those that are gone
        self._asked: dict[int, Asked] = {}
        self._numbers = 0

    def told_to_stop(self, number: int, _: FrameType | None) -> None:
        """A signal: let what runs finish; the second one: end at once. During the start, give it up."""
        self._signals += 1
        if self._is_ready:
            self._supervisor.interrupt()
        else:
            self._setup.processes.stop()

    def run(self) -> int:
        """The life of the server."""
        self._supervisor.launch()
        for index in range(len(self._seats)):
            self._start(index)
        try:
            self._relay.start()
        except Exception:
            if self._signals:
                return 0
            raise
        self._is_ready = True
        try:
            while not self._signals or self._alive():
                self._relay.step()
                self._look_after()
        except EngineDeadError as error:
            logger.critical("%s; the server ends with status 1", error)
            self._wait_for_all()
            return 1
        return 0

    def close(self) -> None:
        """End what lives."""
        for api in self._alive():
            api.process.kill()
            api.process.wait()
        for seat in self._seats:
            seat.listener.close()
        self._supervisor.close()

    # ---------------------------------------------------------------- processes

    def _alive(self) -> list[ApiProcess]:
        return [seat.api for seat in self._seats if seat.api is not None]

    def _start(self, index: int) -> None:
        self._lives += 1
        life, seat = self._lives, self._seats[index]
        try:
            ours, theirs = socket.socketpair()
            engine_end, relay_end = socket.socketpair()
            with theirs, engine_end:
                ends = (seat.listener.fileno(), engine_end.fileno(), theirs.fileno())
                process = subprocess.Popen([*COMMAND, *map(str, ends)], stdin=subprocess.DEVNULL, pass_fds=ends)
        except OSError as error:
            logger.error("an API process cannot be started: %s", error)
            self._plan(seat)
            return
        seat.api = ApiProcess(life, process, wire.Connection(ours, ToParent), time.monotonic())
        setup = self._setup
        again = self._has_greeted
        begin = Begin(life, index, len(self._seats), again, setup.engine, setup.serve, setup.keys, setup.began)
        seat.api.connection.send(begin)
        self._supervisor.beside.append(seat.api.connection)
        self._relay.join(life, wire.Connection(relay_end, wire.ToEngine))

    def _plan(self, seat: Seat) -> None:
        """The next start at this seat."""
        seat.deaths += 1
        pause = 0.0 if seat.deaths == 1 else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (seat.deaths - 2))
        seat.start_at = time.monotonic() + pause

    def _look_after(self) -> None:
        """Hear everybody; note deaths, start who is due, pass on the wish to stop."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LONGEST_LOOK), now
        for index, seat in enumerate(self._seats):
            if seat.api is not None:
                self._hear(seat.api)
                self._end_silent(seat.api, passed)
                if seat.api.connection.ended or now > self._kill_at:
                    self._bury(seat, seat.api)
            elif not self._signals and now >= seat.start_at:
                self._start(index)
        while self._heeded < self._signals:
            self._heeded += 1
            self._kill_at = now + self._setup.serve.shutdown_timeout + LATE_SECONDS
            for seat in self._seats:
                seat.listener.close()  # so that whoever comes now is refused, once the API processes have closed theirs
            for api in self._alive():
                api.connection.send(Stop())

    def _end_silent(self, api: ApiProcess, passed: float) -> None:
        """An API process that stands still keeps those waiting who come to its socket."""
        api.silent += passed
        if api.lines is not None and 0 < self._setup.patience.silence <= api.silent:
            logger.error("API process %d has said nothing for %.1f s; it is ended", api.process.pid, api.silent)
            api.silent = 0.0
            api.process.kill()

    def _bury(self, seat: Seat, api: ApiProcess) -> None:
        """An API process is gone, or cut off: nothing of it stays but its counts."""
        status = ended(api.process)
        seat.api = None
        self._supervisor.beside.remove(api.connection)
        api.connection.close()
        self._relay.leave(api.life)
        self._past = total((self._past, api.note.tallies))
        for number in [number for number, asked in self._asked.items() if api.life in asked.left]:
            self._replied(number, api.life, None)
        if self._signals:
            return
        logger.error("API process %d %s; its connections are lost", api.process.pid, ending(status))
        if time.monotonic() - api.began > LONG_LIFE:
            seat.deaths = 0
        self._plan(seat)

    def _wait_for_all(self) -> None:
        """The engine is lost: let those who wait be told so."""
        end = time.monotonic() + LATE_SECONDS
        for api in self._alive():
            try:
                api.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                api.process.kill()

    # ---------------------------------------------------------------- messages

    def _hear(self, api: ApiProcess) -> None:
        try:
            api.connection.push()
            for message in api.connection.receive():
                self._take(api, message)
        except Exception:
            logger.exception("what API process %d says is not understood; it is ended", api.process.pid)
            api.process.kill()

    def _take(self, api: ApiProcess, message: ToParent) -> None:
        api.silent = 0.0
        if isinstance(message, Note):
            api.note = message
        elif isinstance(message, SumWanted):
            notes = [other.note for other in self._alive()]
            counts = total((self._past, *(note.tallies for note in notes)))
            api.connection.send(Sum(message.number, counts, sum(note.load for note in notes)))
        elif isinstance(message, Question):
            self._pass_on(api, message)
        elif isinstance(message, Reply):
            self._replied(message.number, api.life, message)
        elif isinstance(message, Up):
            api.lines = message.lines
            self._greet()

    def _greet(self) -> None:
        """Once, when all are up."""
        processes = self._alive()
        lines = processes[0].lines
        if self._has_greeted or lines is None or not all(api.lines for api in processes):
            return
        self._has_greeted = True
        announce(lines)

    def _pass_on(self, asker: ApiProcess, question: Question) -> None:
        """Ask all others that are up."""
        others = [api for api in self._alive() if api is not asker and api.lines is not None]
        self._numbers += 1
        self._asked[self._numbers] = Asked(asker, question, {api.life for api in others})
        for api in others:
            api.connection.send(Question(self._numbers, question.topic, question.key, question.tenant))
        self._settle(self._numbers)

    def _replied(self, number: int, life: int, reply: Reply | None) -> None:
        """One has answered, or is gone. The first one that knows is enough, unless all are wanted."""
        asked = self._asked.get(number)
        if asked is None:
            return
        asked.left.discard(life)
        if reply is not None and reply.found is not None:
            if not asked.question.every:
                del self._asked[number]
                reply = Reply(asked.question.number, reply.found, reply.error, reply.field)
                asked.asker.connection.send(reply)
                return
            asked.found.append(reply.found)
        self._settle(number)

    def _settle(self, number: int) -> None:
        """Answer when nobody is left to answer."""
        asked = self._asked[number]
        if not asked.left:
            del self._asked[number]
            asked.asker.connection.send(Reply(asked.question.number, asked.found or None))


def ended(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that has ended or is about to; one that does not is killed."""
    try:
        return process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
