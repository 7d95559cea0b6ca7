"""Connection: uvicorn's HTTP protocol, which would wait for the rest of a request for ever, and take connections until no
file is left for anything else, and here does neither.

Knows no route.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from quire.serve.errors import Failure
from quire.serve.listen import most_connections

OWED_SECONDS = 60.0  # that a client gets for the line and headers of a request, and for each next piece of its body
_BODY = bytes(Failure(503, "ServiceUnavailableError", "The server has no room for another connection.").response().body)
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


class Connection(H11Protocol):
    """Closed when its client says nothing for too long while it is his turn, before the first request, too. And at once
    where there are as many as there may be.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The client's turn."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.write(FULL)
            transport.close()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        """A piece of a request, or several requests."""
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY:
            self._stop_waiting()
            self._wait()
        elif self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._patience is None:  # between two requests uvicorn waits, until the first byte of the next one
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._patience = self.loop.call_later(OWED_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
