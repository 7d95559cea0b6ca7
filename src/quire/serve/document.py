"""The OpenAPI document: what FastAPI makes of the routes, with the errors and the keys that the layers add.

Knows paths, no route's body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from quire.serve.auth import PUBLIC


class ErrorBody(BaseModel):
    """What went wrong; `code` is the status, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """Every error but those of /v1/messages, which have Anthropic's shape."""

    error: ErrorBody


# For each route. Naming them takes away the 422 that FastAPI would claim: what it means is a 400 here.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is wrong, or comes at the wrong time (408, 429)."},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot answer now; Retry-After says when to come back."},
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def with_keys(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The application's document, which says where a key is needed. For FastAPI.openapi."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {})["securitySchemes"] = _SCHEMES
        found["security"] = [{name: []} for name in _SCHEMES]
        for path, operations in found["paths"].items():
            if path in PUBLIC:
                for operation in operations.values():
                    operation["security"] = []
        return found

    return document
