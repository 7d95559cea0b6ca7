"""Neighbours: the other API processes of a server, as one of them reaches them: by messages through their parent.

What one of them alone knows (its live requests, its stored responses) is asked for, what all of them count is told to
the parent, which adds it up. Knows no engine and no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from quire.config import EngineOptions, ServeOptions
from quire.engine.metrics import Counted
from quire.engine.tallies import Tallies
from quire.engine.wire import Connection

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 12.0  # that the others get
NOTE_SECONDS = 0.25  # between two notes of what was counted
BEAT_SECONDS = 1.0  # after which it is told although nothing has changed: this process lives


# ---------------------------------------------------------------- messages


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """The first message to an API process. `life` is its number, `index` which of `count` places it has, `again`: after
    one that died.
    """

    life: int
    index: int
    count: int
    again: bool
    engine: EngineOptions
    serve: ServeOptions
    keys: tuple[str, ...]
    began: float  # when the server's start began, on the clock of time.perf_counter()


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Finish what runs and end; a second one: end at once."""


class Up(msgspec.Struct, tag="up", frozen=True):
    """The process takes requests. `lines`: what to print when all do."""

    lines: list[str]


class Question(msgspec.Struct, tag="question", frozen=True):
    """Who knows this? To the parent from one process, from there to all others."""

    number: int
    topic: str
    key: str
    tenant: str
    every: bool = False  # wait for all of them


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """`found` is None where nobody knows; `error` names the exception of quire.errors that the answer is instead.

    To a question to all, `found` is the list of what those found that know something.
    """

    number: int
    found: Any = None
    error: str | None = None
    field: str | None = None


class Note(msgspec.Struct, tag="note", frozen=True):
    """What a process has counted so far, and how many requests it is answering."""

    tallies: Tallies
    load: int


class SumWanted(msgspec.Struct, tag="sum?", frozen=True):
    """What have all counted together?"""

    number: int


class Sum(msgspec.Struct, tag="sum", frozen=True):
    """The sum of all notes: the counts of those that are gone, too, the load of those that live."""

    number: int
    tallies: Tallies
    load: int


FromParent = Begin | Stop | Question | Reply | Sum
ToParent = Up | Question | Reply | Note | SumWanted


# ---------------------------------------------------------------- one process's end


class Neighbours:
    """Used in the event loop alone. `answer` makes the reply to a question of another process."""

    def __init__(self, connection: Connection[FromParent]) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._wanted: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._noted: Note | None = None
        self._noted_at = 0.0
        self._answer: Callable[[Question], Awaitable[Reply]] | None = None
        self._on_stop: Callable[[], None] = lambda: None

    def listen(self, on_stop: Callable[[], None]) -> None:
        """Take messages from now on. To be called in the event loop."""
        self._on_stop = on_stop
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._hear)
        self._hear()

    def up(self, lines: list[str], answer: Callable[[Question], Awaitable[Reply]]) -> None:
        """This process takes requests, and questions of others."""
        self._answer = answer
        self._send(Up(lines))

    async def ask(self, topic: str, key: str, tenant: str) -> Reply:
        """What the first one says that knows; a reply without anything where nobody does."""
        number = next(self._numbers)
        return await self._reply(number, Question(number, topic, key, tenant), Reply(number))

    async def ask_all(self, topic: str, key: str, tenant: str) -> list[Any]:
        """What each of the others found that knows something."""
        number = next(self._numbers)
        reply = await self._reply(number, Question(number, topic, key, tenant, every=True), Reply(number))
        return reply.found or []

    def note(self, counted: Sequence[Counted], load: int) -> None:
        """Tell what this process has counted."""
        tallies: Tallies = {}
        for collector in counted:
            tallies |= collector.tallies()
        note = Note(tallies, load)
        now = time.monotonic()
        if note != self._noted or now - self._noted_at >= BEAT_SECONDS:
            self._noted, self._noted_at = note, now
            self._send(note)

    async def sum(self) -> Sum:
        """What all have counted, as of their latest notes."""
        number = next(self._numbers)
        last = self._noted or Note({}, 0)
        return await self._reply(number, SumWanted(number), Sum(number, last.tallies, last.load))

    async def _reply(self, number: int, message: ToParent, otherwise: Any) -> Any:
        future = self._wanted[number] = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await future
        except TimeoutError:
            logger.warning("the other API processes do not answer")
            return otherwise
        finally:
            del self._wanted[number]

    # ---------------------------------------------------------------- the socket

    def _send(self, message: ToParent) -> None:
        self._connection.send(message)
        self._push()

    def _push(self) -> None:
        self._connection.push()
        loop, end = asyncio.get_running_loop(), self._connection.fileno()
        if self._connection.has_unsent:
            loop.add_writer(end, self._push)
        else:
            loop.remove_writer(end)

    def _hear(self) -> None:
        for message in self._connection.receive():
            if isinstance(message, Reply | Sum):
                future = self._wanted.get(message.number)
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, Stop):
                self._on_stop()
            elif isinstance(message, Question):
                task = asyncio.create_task(self._tell(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if self._connection.ended:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())

    async def _tell(self, question: Question) -> None:
        reply = Reply(question.number)
        if self._answer is not None:
            with contextlib.suppress(Exception):  # nobody may be kept waiting for an answer
                reply = await self._answer(question)
        self._send(reply)
