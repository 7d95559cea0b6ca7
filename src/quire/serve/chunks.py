"""The short way out for the chunks of a stream: from the event to the socket, past the layers that saw its start.

Each layer around the routes wraps `send`, and the HTTP library goes through its states for every message. A token of a
stream needs none of that: its chunk is framed here. Works over uvicorn's h11 protocol; elsewhere there is no short way.

Chunks of many streams are sent one behind the other, without other work between them: who reads is woken once for many,
and waking takes the system longer than sending.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

CHUNKS = "quire.chunks"  # where the scope of a request has its Chunks
TOGETHER = 32  # connections whose chunks are sent together; the first of them waits for the last


class Outbox:
    """The connections of an event loop that have chunks to be sent, in the order in which they got the first of them."""

    def __init__(self) -> None:
        self._holders: list[Chunks] = []

    def add(self, holder: Chunks) -> None:
        """Let it send soon: with others, at the latest when what is ready to run now has run."""
        if not self._holders:
            asyncio.get_running_loop().call_soon(self.flush)
        self._holders.append(holder)
        if len(self._holders) >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Let all send now."""
        holders, self._holders = self._holders, []
        for holder in holders:
            holder.send()


class Chunks:
    """One connection's writer, for between the start of a chunked answer and its end."""

    def __init__(self, cycle: RequestResponseCycle, outbox: Outbox) -> None:
        self._cycle = cycle
        self._outbox = outbox
        self._held = b""  # framed, to be sent

    def write(self, data: bytes) -> bool:
        """Send a chunk. True if drain() should be awaited before the next one. Nothing when the client has left."""
        cycle = self._cycle
        if cycle.disconnected or cycle.transport.is_closing():  # one that broke in a write is told of a moment later
            return False
        frame = b"%x\r\n%b\r\n" % (len(data), data)
        if self._held:
            self._held += frame
        else:
            self._held = frame
            self._outbox.add(self)
        return cycle.flow.write_paused

    def send(self) -> None:
        """Send what is held. A transport whose client has left lets it fall."""
        held, self._held = self._held, b""
        self._cycle.transport.write(held)

    def flush(self) -> None:
        """Send what was written, before something else is sent another way."""
        self._outbox.flush()

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        if not self._cycle.disconnected:
            await self._cycle.flow.drain()


class ShortWay:
    """ASGI layer, the outermost: offers Chunks to whoever answers, where the answer's body will be in chunks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._outbox = Outbox()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and scope["http_version"] == "1.1" and scope["method"] != "HEAD":
            scope = {**scope, CHUNKS: Chunks(cycle, self._outbox)}
        await self._app(scope, receive, send)
