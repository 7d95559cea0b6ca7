"""The time before the server is ready: it listens, says what it is doing, and sends everybody away until it can serve.

Knows the phases of a start by name only, no engine and no route but those of health.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import quire
from quire.serve.errors import Failure

COME_BACK_SECONDS = 2
STARTING = "starting"


@dataclass(slots=True)
class StartReport:
    """The phases of a start with their seconds. Written by the thread that starts, read by the event loop."""

    began: float = field(default_factory=time.perf_counter)
    phases: list[tuple[str, float]] = field(default_factory=list)
    phase: str = "starting the engine process"  # what is being done now

    def add(self, name: str, seconds: float | None) -> None:
        """A phase begins, where `seconds` is None, or is over."""
        if seconds is None:
            self.phase = name
        else:
            self.phases.append((name, seconds))

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    def body(self) -> dict[str, object]:
        """What /livez and /readyz tell."""
        return {
            "status": STARTING,
            "phase": self.phase,
            "seconds": round(self.seconds, 3),
            "done": {name: round(seconds, 3) for name, seconds in list(self.phases)},
        }

    def lines(self, address: str, model: str, key_needed: bool) -> list[str]:
        """What to print when the server is ready."""
        total = self.seconds
        rest = max(0.0, total - sum(seconds for _, seconds in self.phases))  # two processes may import at once
        phases = [*self.phases, ("all the rest", rest)]
        shown = "".join(f"\n  {name:<26} {seconds:6.2f} s" for name, seconds in phases)
        key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if key_needed else ""
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Tell me a tale."}}]}}'
        return [
            f"quire {quire.__version__} serves {model} at {address}",
            f"Ready after {total:.2f} s:{shown}",
            "Try it:",
            f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        ]


class Doorway:
    """The ASGI application of a server that may not be ready yet. `waiting` answers until open() brings the routes; where
    there is none, requests wait for that.
    """

    def __init__(self, waiting: ASGIApp | None) -> None:
        self._app = waiting
        self._opened = asyncio.Event()

    def open(self, app: ASGIApp) -> None:
        """From now on this application answers."""
        self._app = app
        self._opened.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if self._app is None:
            await self._opened.wait()
        assert self._app is not None, "it is open"
        await self._app(scope, receive, send)


class NotYet:
    """The application of a server that starts: alive, not ready, and everything else later."""

    def __init__(self, report: StartReport) -> None:
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] == "http":
            await self._answer(scope["path"].removeprefix(scope.get("root_path", "")))(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})

    def _answer(self, path: str) -> Response:
        later = {"Retry-After": str(COME_BACK_SECONDS)}
        if path == "/livez":
            return JSONResponse(self._report.body())
        if path == "/readyz":
            return JSONResponse(self._report.body(), 503, later)
        message = f"The server is starting: {self._report.phase}, for {self._report.seconds:.0f} s."
        return Failure(503, "ServiceUnavailableError", message, headers=later).response(path)
