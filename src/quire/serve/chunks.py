"""The short way out for the chunks of a stream: from the event to the socket, past the layers that saw its start.

Each layer around the routes wraps `send`, and the HTTP library goes through its states for every message. A token of a
stream needs none of that: its chunk is framed here. Works over uvicorn's h11 protocol; elsewhere there is no short way.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

CHUNKS = "quire.chunks"  # where the scope of a request has its Chunks


class Chunks:
    """One connection's writer, for between the start of a chunked answer and its end."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def write(self, data: bytes) -> bool:
        """Send a chunk. True if drain() should be awaited before the next one. Nothing when the client has left."""
        cycle = self._cycle
        if cycle.disconnected:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return cycle.flow.write_paused

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        if not self._cycle.disconnected:
            await self._cycle.flow.drain()


class ShortWay:
    """ASGI layer, the outermost: offers Chunks to whoever answers, where the answer's body will be in chunks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and scope["http_version"] == "1.1" and scope["method"] != "HEAD":
            scope = {**scope, CHUNKS: Chunks(cycle)}
        await self._app(scope, receive, send)
