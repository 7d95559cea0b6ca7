"""The plain ASGI layers around the routes: forms, ids, limits on headers and bodies, and the last net for exceptions.

Each does one thing and knows no route. Who may come in is decided in auth.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.errors import ValidationError
from quire.serve.caller import read_trace
from quire.serve.errors import Failure, failure_of, is_anthropic
from quire.serve.sse import ClientLeft

DEEPEST_JSON = 64  # objects and lists within each other
MOST_JSON_PARTS = 250_000  # objects and lists in one body
LONG_BODY = 256 * 1024  # bytes from which on its shape is looked at in a thread, so that streams go on
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_MAYBE_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")  # escaped, as bytes of UTF-8, or not UTF-8 at all
_OPENING, _CLOSING = b"[{", b"]}"
_LENGTHS = {b"content-length", b"transfer-encoding"}
_SLASHES = re.compile("/{2,}")


class RequestIds:
    """Every answer carries X-Request-Id, the client's own or a new one, and the traceparent that came with the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, adding the header to the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        own = given if 0 < len(given) <= 128 and given.isascii() else uuid.uuid4().hex.encode()

        added = [(b"x-request-id", own)]
        if is_anthropic(scope["path"]):
            added.append((b"request-id", own))  # where its clients look for it
        trace = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
        if read_trace(trace.decode("latin-1")) is not None:
            added.append((b"traceparent", trace))

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self._app(scope, receive, named)


class SameRoute:
    """Finds the route of requests that differ from it in form only: HEAD is a GET, of which the HTTP server leaves out
    the body, and a slash at the end of a path, or a second one beside another, means nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] == "http":
            scope = {**scope, "path": _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"}
            if scope["method"] == "HEAD":
                scope["method"] = "GET"
        await self._app(scope, receive, send)


class HeaderLimit:
    """Refuses requests with too many headers, and those that tell the length of their body in two ways, of which a proxy
    may have believed the other one. How long headers may be in all is the HTTP parser's limit.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on while the headers are within the limit, else answer 431."""
        if scope["type"] == "http" and len(scope["headers"]) > self._most:
            message = f"The request has more than {self._most} headers."
            await Failure(431, "RequestTooLargeError", message).response(scope["path"])(scope, receive, send)
            return
        if scope["type"] == "http" and {name for name, _ in scope["headers"]} >= _LENGTHS:
            message = "The request has a Content-Length and a Transfer-Encoding. Send one of them."
            failure = Failure(400, "BadRequestError", message, headers={"Connection": "close"})
            await failure.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large before they are read into memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._message = f"The body is larger than {most} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on while the body is within the limit, else answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._most:
            await Failure(413, "RequestTooLargeError", self._message).response(scope["path"])(scope, receive, send)
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
                await failure.response(scope["path"])(scope, receive, send)


class JsonRoute(APIRoute):
    """A route that looks at the shape of its body before anything is built from it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind check_json."""
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if request.method == "POST":
                coding = request.headers.get("content-encoding", "identity")
                if coding.strip().lower() not in ("", "identity"):
                    raise HTTPException(415, "A body with a Content-Encoding is not read. Send it uncompressed.")
                try:
                    body = await request.body()
                except ClientDisconnect as error:
                    raise ClientLeft from error
                if len(body) > LONG_BODY:
                    await asyncio.to_thread(check_json, body)
                else:
                    check_json(body)
            return await handler(request)

        return checked


def check_json(body: bytes) -> None:
    """Raise ValidationError for JSON that is not looked at any further."""
    check_json_shape(body)
    check_json_text(body)


def check_json_shape(body: bytes) -> None:
    """Raise ValidationError for JSON that is nested too deeply or has too many parts. Anything else passes."""
    if body.count(b"[") + body.count(b"{") <= DEEPEST_JSON:
        return
    bare = _STRINGS.sub(b"", body)
    if bare.count(b"[") + bare.count(b"{") > MOST_JSON_PARTS:
        raise ValidationError(f"The body has more than {MOST_JSON_PARTS} objects and lists.")
    depth = 0
    for mark in bare.translate(None, delete=_ALL_BUT_BRACKETS):
        depth += 1 if mark in _OPENING else -1
        if depth > DEEPEST_JSON:
            raise ValidationError(f"The body is nested more than {DEEPEST_JSON} levels deep.")


def check_json_text(body: bytes) -> None:
    """Raise ValidationError where a string is not Unicode. JSON can say half of a surrogate pair, and no answer can."""
    if not any(mark in body for mark in (b"\\u", b"\xed", b"\0")):  # twenty times as fast as the next question
        return
    if not _MAYBE_HALF.search(body):
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValidationError("The body is not valid Unicode: it holds half of a surrogate pair.") from error
    except ValueError:
        return  # no JSON at all, which the route says


_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in _OPENING + _CLOSING)
