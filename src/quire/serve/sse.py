"""Answers that last: server-sent events, and noticing that the client has left. Knows no model and no protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from quire.engine.async_engine import cancel
from quire.serve.chunks import CHUNKS, Chunks
from quire.serve.errors import Failure, failure_of

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still here\n\n"
_Answer = TypeVar("_Answer")
_encode = msgspec.json.Encoder().encode


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def event(content: object) -> bytes:
    """One server-sent event with JSON in it."""
    return b"data: " + _encode(content) + b"\n\n"


class Frame:
    """Events that begin with the same fields, which are written as JSON once. There must be at least one."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._head = b"data: " + _encode(fields)[:-1] + b","

    def event(self, more: dict[str, Any]) -> bytes:
        """An event with these fields besides, which must be others, and at least one."""
        return self._head + _encode(more)[1:] + b"\n\n"


def named_event(content: dict[str, Any]) -> bytes:
    """One server-sent event that says its type twice, in the JSON and as the event's name."""
    return b"event: " + content["type"].encode() + b"\n" + event(content)


def json_response(content: object) -> Response:
    """A whole JSON answer."""
    return Response(_encode(content), media_type="application/json")


async def until_left(request: Request, work: Awaitable[_Answer]) -> _Answer:
    """The result of `work`. When the client leaves first, cancel it and raise ClientLeft."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        await cancel(task, left)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_event(failure: Failure) -> bytes:
    return event(failure.body())


class EventStyle:
    """How a protocol ends its streams: what comes last, and how an error in the middle looks."""

    def __init__(self, last: bytes = DONE, failed: Callable[[Failure], bytes] = _error_event) -> None:
        self.last = last
        self.failed = failed


OPENAI = EventStyle()


Emit = Callable[[bytes], None]
Making = Callable[[Emit], Coroutine[Any, Any, None]]  # what makes the events of an answer and returns behind the last


class Pipe:
    """The way of events from what makes them to the connection.

    Where there is a short way, they go straight into it. Otherwise, and while the client reads too slowly, they wait here.
    """

    def __init__(self) -> None:
        self._straight: Chunks | None = None
        self._waiting: list[bytes] = []
        self._news = asyncio.Event()

    def put(self, event: bytes) -> None:
        """The next event. In the event loop alone."""
        if self._straight is None:
            self._waiting.append(event)
            self._news.set()
        elif self._straight.write(event):
            self._straight = None
            self._news.set()

    async def wait(self, making: asyncio.Future[None], patience: float = 0.0) -> bool:
        """Until events wait, the client reads too slowly, or `making` is over; False after `patience` seconds, if any."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            done, _ = await asyncio.wait((news, making), timeout=patience or None, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if done:
            self._news.clear()
        return bool(done)

    @property
    def has_waiting(self) -> bool:
        """Whether some wait."""
        return bool(self._waiting)

    def waiting(self) -> list[bytes]:
        """The events that wait, which are the caller's from now on."""
        found, self._waiting = self._waiting, []
        return found

    def go_straight(self, chunks: Chunks) -> None:
        """From now on events need not wait. None may be left that does."""
        assert not self._waiting, "events keep their order"
        self._straight = chunks


async def stream(request: Request, make: Making, style: EventStyle = OPENAI, patience: float = 0.0) -> Response:
    """Events as an answer. What goes wrong before the first one raises, so that it gets its proper status.

    `patience`: seconds after which a silent stream says that it is still there, from the beginning on; 0 for never.
    A stream that says so before its first event has begun, and reports what goes wrong from then on as an event.
    """
    pipe = Pipe()
    making = asyncio.ensure_future(make(pipe.put))
    try:
        if not await until_left(request, pipe.wait(making, patience)):
            pipe.put(KEEP_ALIVE)
        first = pipe.waiting()
        if not first:
            making.result()
    except BaseException:
        await cancel(making)
        raise
    return EventStream(first, pipe, making, style, patience)


class EventStream(StreamingResponse):
    """Events as they come. An error becomes an event; a client that leaves ends what makes them."""

    def __init__(
        self, first: list[bytes], pipe: Pipe, making: asyncio.Future[None], style: EventStyle, patience: float
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__((), headers=headers, media_type="text/event-stream")
        self._first = first
        self._pipe = pipe
        self._making = making
        self._style = style
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client leaves."""
        task = asyncio.ensure_future(self._send(send, scope.get(CHUNKS)))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await cancel(task, left, self._making)

    async def _send(self, send: Send, chunks: Chunks | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for event in self._first:
            await _body(send, event)
        try:
            await self._pass_on(send, chunks)
            await self._making
        except Exception as error:
            if chunks is not None:
                chunks.flush()
            await _body(send, self._style.failed(failure_of(error)))
        if chunks is not None:
            chunks.flush()
        if self._style.last:
            await _body(send, self._style.last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, send: Send, chunks: Chunks | None) -> None:
        """Send events until no more will come."""
        pipe, patience = self._pipe, self._patience
        while True:
            for event in pipe.waiting():
                if chunks is None:
                    await _body(send, event)
                else:
                    chunks.write(event)
            if chunks is not None:
                await chunks.drain()
            if pipe.has_waiting:
                continue
            if self._making.done():
                return
            if chunks is not None and not patience:
                pipe.go_straight(chunks)
            if not await pipe.wait(self._making, patience):
                pipe.put(KEEP_ALIVE)


async def _body(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
