"""Caller: who asks, how long the answer may take, and the trace that it belongs to, as the headers say.

What a body says is in protocol.py. Knows no route and no engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from quire.errors import ValidationError
from quire.serve.auth import tenant_of

TIMEOUT_HEADER = "x-request-timeout"
_TRACE = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Trace:
    """A W3C trace context: the ids of a trace and of the caller's span, as lower-case hexadecimals."""

    trace_id: str
    span_id: str
    flags: str = "01"


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller of a route that generates. `tenant` is the name behind an API key, empty on a server without keys."""

    tenant: str = ""
    timeout: float | None = None  # seconds
    trace: Trace | None = None


def caller_of(request: HTTPConnection) -> Caller:
    """Whoever sent this request. Raises ValidationError for a header that makes no sense."""
    given = request.headers.get(TIMEOUT_HEADER)
    try:
        timeout = None if given is None else float(given)
    except ValueError as error:
        raise ValidationError("The header X-Request-Timeout must be a number of seconds.", TIMEOUT_HEADER) from error
    return Caller(tenant_of(request.scope), timeout, read_trace(request.headers.get("traceparent")))


def read_trace(header: str | None) -> Trace | None:
    """The trace context in a traceparent header; one that is malformed counts as none, as the standard has it."""
    found = _TRACE.fullmatch(header.strip()) if header else None
    return None if found is None else Trace(*found.groups())
