"""Every exception that quire raises on purpose, as one tree.

Client errors know the HTTP status and the field at fault, so that a server needs no table of its own. Each message says
what was found, what was tried and what to do. Nothing here imports another part of quire.

    QuireError
    ├── ClientError (400)            the request is wrong; nothing else is touched
    │   ├── ValidationError (400)    a field's value; also a ValueError, as callers of such libraries expect
    │   ├── NotFoundError (404)      a model, adapter or request that does not exist
    │   ├── TimeOverError (408)      the time that the request allowed is over
    │   └── OverloadedError (503)    the queue is full or the server drains; says when to come back
    │       └── DeadlineError (429)  the time that the request allows is too short for the present queue
    ├── NoSuchMethodError            a method of other engines that quire does not have; also an AttributeError
    ├── ConfigError                  options that cannot work together, or an unknown option; also a ValueError
    ├── ModelError                   a model that cannot be found, read or run
    │   ├── ModelNotFoundError
    │   ├── UnsupportedModelError    architecture or quantization that no path can run
    │   └── CheckpointError          missing, corrupt, truncated or contradicting weights
    ├── CapacityError                not enough memory for what was asked
    └── EngineError                  the engine itself failed
        ├── RequestFailedError       one request failed while running; its neighbours did not
        └── EngineDeadError          the engine cannot go on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuireError(Exception):
    """Root of all errors raised on purpose by quire."""


class ClientError(QuireError):
    """The request is wrong. `field` names the offending field, `value` what was found there."""

    status = 400

    def __init__(self, message: str, field: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = value

    def __str__(self) -> str:
        if self.field is None:
            return self.message
        shown = "" if self.value is None else f", value={str(self.value)[:80]}"
        return f"{self.message} (parameter={self.field}{shown})"


class ValidationError(ClientError, ValueError):
    """A field of a request or of its parameters has an impossible value."""


class NotFoundError(ClientError):
    """The named model, adapter or request does not exist."""

    status = 404


class OverloadedError(ClientError):
    """The request was refused because of load or shutdown; `retry_after` is in seconds."""

    status = 503

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(OverloadedError):
    """The request was refused at once: its time would be over before its turn came."""

    status = 429


class TimeOverError(ClientError):
    """The request's time was over before its answer was complete; what it held is free again."""

    status = 408


class NoSuchMethodError(QuireError, AttributeError):
    """A method that other engines have and quire has not; the message says what to do instead."""


class ConfigError(QuireError, ValueError):
    """An unknown option, or options that cannot work together."""


class ModelError(QuireError):
    """A model that cannot be found, read or run."""


class ModelNotFoundError(ModelError):
    """Neither a local folder nor a hub id leads to this model."""


class UnsupportedModelError(ModelError):
    """No path of quire can run this architecture or this quantization."""


class CheckpointError(ModelError):
    """The weights are missing, corrupt, truncated, or contradict the config."""


class CapacityError(QuireError):
    """There is not enough memory (or other room) for what was asked."""


class EngineError(QuireError):
    """The engine failed; the message says where."""


class RequestFailedError(EngineError):
    """One request failed while it was running; its neighbours were not touched."""


class EngineDeadError(EngineError):
    """The engine cannot go on; every live request has been told."""


def reason(error: Exception) -> str:
    """What an exception says, in words: without the number of a system's error, and without a dot at its end."""
    return str(getattr(error, "strerror", None) or error).rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", or nothing when no known name comes near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
