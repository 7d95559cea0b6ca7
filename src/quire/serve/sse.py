"""Answers that last: server-sent events, and noticing that the client has left. Knows no model and no protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

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
        await _cancel(task, left)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _error_event(failure: Failure) -> bytes:
    return event(failure.body())


class EventStyle:
    """How a protocol ends its streams: what comes last, and how an error in the middle looks."""

    def __init__(self, last: bytes = DONE, failed: Callable[[Failure], bytes] = _error_event) -> None:
        self.last = last
        self.failed = failed


OPENAI = EventStyle()


async def stream(
    request: Request, events: AsyncGenerator[bytes], style: EventStyle = OPENAI, patience: float = 0.0
) -> Response:
    """Events as an answer. What goes wrong before the first one raises, so that it gets its proper status.

    `patience`: seconds after which a silent stream says that it is still there, from the beginning on; 0 for never.
    A stream that says so before its first event has begun, and reports what goes wrong from then on as an event.
    """
    events = events if patience <= 0 else _kept_alive(events, patience)
    return EventStream(await until_left(request, anext(events)), events, style)


async def _kept_alive(events: AsyncGenerator[bytes], patience: float) -> AsyncGenerator[bytes]:
    """The events, and comments while there are none."""
    async with aclosing(events):
        task: asyncio.Future[bytes] | None = None
        try:
            while True:
                task = asyncio.ensure_future(anext(events))
                while not (await asyncio.wait((task,), timeout=patience))[0]:
                    yield KEEP_ALIVE
                try:
                    chunk = task.result()
                except StopAsyncIteration:
                    return
                yield chunk
        finally:
            if task is not None and not task.done():
                await _cancel(task)


class EventStream(StreamingResponse):
    """Events as they come. An error becomes an event; a client that leaves ends the iterator."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], style: EventStyle = OPENAI) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(rest, headers=headers, media_type="text/event-stream")
        self._first = first
        self._rest = rest
        self._style = style

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client leaves."""
        task = asyncio.ensure_future(self._send(send, scope.get(CHUNKS)))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await _cancel(task, left)

    async def _send(self, send: Send, chunks: Chunks | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _body(send, self._first)
        try:
            async with aclosing(self._rest) as rest:
                async for chunk in rest:
                    if chunks is None:
                        await _body(send, chunk)
                    elif chunks.write(chunk):
                        await chunks.drain()
        except Exception as error:
            if chunks is not None:
                chunks.flush()
            await _body(send, self._style.failed(failure_of(error)))
        if chunks is not None:
            chunks.flush()
        if self._style.last:
            await _body(send, self._style.last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
