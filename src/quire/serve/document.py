"""The OpenAPI document: what FastAPI makes of the routes, with what bodies may hold, errors, and the layers' keys.

Knows paths, no route's body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from quire.serve.auth import PUBLIC
from quire.serve.document_fields import EXAMPLES, FIELDS, ONE_OF, OWN, REQUIRED


@dataclass(frozen=True, slots=True)
class Limits:
    """What the document tells of this model and server: names, tokens, log-probabilities at each position."""

    names: tuple[str, ...]
    vocabulary: int
    logprobs: int


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


def described(app: FastAPI, limits: Limits, with_keys: bool) -> Callable[[], dict[str, Any]]:
    """The application's document, with what bodies may hold and where a key is needed. For FastAPI.openapi."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        for name, schema in found["components"]["schemas"].items():
            if name in EXAMPLES:
                _describe(name, schema, limits)
        if with_keys:
            _name_keys(found)
        return found

    return document


def _describe(name: str, body: dict[str, Any], limits: Limits) -> None:
    """Fill in what the fields of one body may hold."""
    body["required"] = sorted({*body.get("required", ()), *REQUIRED.get(name, ())})
    known = {**FIELDS, **OWN.get(name, {}), "model": {"type": "string", "enum": list(limits.names)}}
    for field, schema in body["properties"].items():
        if field in known:
            wanted = _bounded(known[field], limits)
            body["properties"][field] = wanted if field in body["required"] else {"anyOf": [wanted, {"type": "null"}]}
        else:
            body["properties"][field] = _bounded(schema, limits)
    if name in ONE_OF:
        body["oneOf"] = [{"required": [field]} for field in ONE_OF[name]]
    body["examples"] = [EXAMPLES[name]]


def _bounded(schema: Any, limits: Limits) -> Any:
    """A schema with the limits of this model and server in it."""
    if isinstance(schema, list):
        return [_bounded(part, limits) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _bounded(value, limits) for key, value in schema.items()}
    if found.get("format") in ("token-id", "logprobs"):
        found["maximum"] = limits.vocabulary - 1 if found["format"] == "token-id" else limits.logprobs
    return found


def _name_keys(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = _SCHEMES
    document["security"] = [{name: []} for name in _SCHEMES]
    for path, operations in document["paths"].items():
        if path in PUBLIC:
            for operation in operations.values():
                operation["security"] = []
