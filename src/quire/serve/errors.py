"""What clients see when something goes wrong: one shape of body, a status, and never a word about the inside.

Messages of quire's own client errors are made for clients and go out as they are; all others are logged and replaced.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quire.errors import CapacityError, ClientError, EngineDeadError, NotFoundError, OverloadedError, RequestFailedError

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{5,}")
_PATH = re.compile(r"(?<![\w.:/])(?:/(?!v\d/)[\w.+@~-]+){2,}/?")


def clean(message: str) -> str:
    """A message without memory addresses and without paths of this machine, and valid Unicode whatever it repeats."""
    text = message.encode("utf-8", "replace").decode()
    return _PATH.sub("(a path)", _ADDRESS.sub("(an address)", text))


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it goes to the client."""

    status: int
    type: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        """The JSON body, also used inside a stream."""
        return {"error": {"message": clean(self.message), "type": self.type, "param": self.param, "code": self.status}}

    def anthropic_body(self) -> dict[str, object]:
        """The same in the shape of Anthropic's API."""
        kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        place = f"{self.param}: " if self.param and not self.message.startswith(self.param) else ""
        return {"type": "error", "error": {"type": kind, "message": place + clean(self.message)}}

    def response(self, path: str = "") -> JSONResponse:
        """The HTTP response, in the shape that clients of this path expect."""
        body = self.anthropic_body() if is_anthropic(path) else self.body()
        return JSONResponse(body, self.status, self.headers)


def is_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's protocol."""
    return path.partition("/v1/")[2].startswith("messages")


_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "TooManyRequestsError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    431: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}


def failure_of(error: BaseException) -> Failure:
    """The answer to an exception. Unexpected ones are logged with their traceback."""
    if isinstance(error, OverloadedError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after or 1)))}
        return Failure(error.status, _NAMES[error.status], error.message, error.field, wait)
    if isinstance(error, ClientError):
        kind = _NAMES[404] if isinstance(error, NotFoundError) else _NAMES.get(error.status, _NAMES[400])
        return Failure(error.status, kind, error.message, error.field)
    if isinstance(error, CapacityError):  # this request needs more than the engine has, today and tomorrow
        return Failure(400, _NAMES[400], str(error))
    if isinstance(error, EngineDeadError):
        return Failure(503, _NAMES[503], "The engine has stopped. The server's log says why.")
    if isinstance(error, RequestFailedError):
        return Failure(500, "InternalServerError", str(error))
    logger.error("a request failed unexpectedly", exc_info=error)
    return Failure(500, "InternalServerError", "The server failed on this request. Its log says why.")


def install(app: FastAPI) -> None:
    """Answer every exception of the routes in the one shape."""
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientError, _any_error)
    app.add_exception_handler(CapacityError, _any_error)
    app.add_exception_handler(EngineDeadError, _any_error)
    app.add_exception_handler(RequestFailedError, _any_error)


async def _any_error(request: Request, error: Exception) -> JSONResponse:
    return failure_of(error).response(request.scope["path"])


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = _NAMES.get(error.status_code, "BadRequestError" if error.status_code < 500 else "InternalServerError")
    message = str(error.detail)
    if error.status_code == 404 and message == "Not Found":
        message = "There is no such route." + _meant(request)
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        message = f"This route does not take {request.method}, but {allowed}."
    elif isinstance(
        error.__cause__, UnicodeDecodeError
    ):  # FastAPI tells no more than that the body could not be parsed
        message = "The body is not valid UTF-8."
    elif isinstance(error.__cause__, ValueError):  # such as a number of 5,000 digits
        message = "The body is not valid JSON."
    return Failure(error.status_code, kind, message, headers=dict(error.headers or {})).response(request.scope["path"])


def _meant(request: Request) -> str:
    """The route that was probably meant: one whose path this one ends with, whatever stands before it."""
    path, routes = request.scope["path"], request.app.state.paths
    ends = [route for route in routes if route != "/" and path.endswith(route.removeprefix("/v1"))]
    return f" Was {max(ends, key=len)} meant?" if ends else " GET /docs lists all there are."


async def _invalid_body(request: Request, error: Exception) -> JSONResponse:
    """A body that is no JSON, or whose fields have the wrong type. The values themselves are not repeated."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        return Failure(400, "Bad Request", "The Content-Type must be application/json.").response(request.scope["path"])
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Failure(400, "Bad Request", "The body is not valid JSON.").response(request.scope["path"])
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    more = len(error.errors()) - 1
    others = f" ({more} more such errors)" if more else ""
    return Failure(400, "Bad Request", f"{place or 'body'}: {first['msg']}{others}", place or None).response(
        request.scope["path"]
    )
