"""create_app: the routes and the layers around them, outermost last. Knows no model and starts nothing."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import quire
from quire.serve import admin, chats, completions, errors
from quire.serve.auth import KeyCheck
from quire.serve.errors import Failure, failure_of
from quire.serve.service import Service
from quire.serve.sse import ClientLeft
from quire.serve.traffic import Traffic, TrafficLayer

LARGEST_BODY = 64 * 2**20  # bytes; about the longest prompts there are, as token ids


def create_app(service: Service, keys: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI application over a started AsyncEngine. `keys`: API keys; none lets everybody in."""
    app = FastAPI(title="quire", version=quire.__version__)
    app.state.service = service
    for module in (completions, chats, admin):
        app.include_router(module.router)
    errors.install(app)
    app.add_exception_handler(ClientLeft, _left)
    app.add_middleware(ErrorShield)
    app.add_middleware(BodyLimit, most=LARGEST_BODY)
    if service.registry is not None:
        traffic = Traffic()
        service.registry.register(traffic)
        app.add_middleware(TrafficLayer, traffic=traffic)
    app.add_middleware(RequestIds)
    if keys:
        app.add_middleware(KeyCheck, keys=keys)
    return app


async def _left(_: Request, __: Exception) -> Response:
    """Nobody reads this answer; 499 is how proxies write it down."""
    return Response(status_code=499)


class RequestIds:
    """Every answer carries X-Request-Id: the client's own or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, adding the header to the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        own = given if 0 < len(given) <= 128 and given.isascii() else uuid.uuid4().hex.encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", own)]
            await send(message)

        await self._app(scope, receive, named)


class BodyLimit:
    """Refuses bodies that are too large before they are read into memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._message = f"The body is larger than {most // 2**20} MiB."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on while the body is within the limit, else answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._most:
            await Failure(413, "RequestTooLargeError", self._message).response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)


class ErrorShield:
    """Turns what no route expected into a 500 that says nothing of the inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; answer for an exception unless the answer has begun."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            failure = failure_of(error)  # logs it
            if not begun and scope["type"] == "http":
                await failure.response()(scope, receive, send)
