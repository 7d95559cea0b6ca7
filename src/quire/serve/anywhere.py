"""What a client asks about may be with any API process of the server: here, or with a neighbour.

A topic is a function of this process's Service, with a key and a tenant; what it returns is plain data, and NotFoundError
means that another one may know. Where there is one API process, nobody else is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from quire import errors
from quire.errors import ClientError, NotFoundError, QuireError
from quire.serve.neighbours import Question, Reply
from quire.serve.service import Service

Topic = Callable[[Service, str, str], Awaitable[Any]]

_TOPICS: dict[str, Topic] = {}


def topic(function: Topic) -> Topic:
    """Let neighbours ask for this function's answer, under its name."""
    _TOPICS[function.__name__] = function
    return function


async def anywhere(function: Topic, service: Service, key: str, tenant: str) -> Any:
    """The answer of this process, or of the one that knows. Raises what the function raised there."""
    try:
        return await function(service, key, tenant)
    except NotFoundError:
        if service.neighbours is None:
            raise
        reply = await service.neighbours.ask(function.__name__, key, tenant)
        if reply.error is not None:
            raise _error(reply) from None
        if reply.found is None:
            raise
        return reply.found


async def answer(service: Service, question: Question) -> Reply:
    """What this process says to a neighbour."""
    try:
        found = await _TOPICS[question.topic](service, question.key, question.tenant)
    except NotFoundError:
        return Reply(question.number)
    except ClientError as error:
        return Reply(question.number, error.message, type(error).__name__, error.field)
    except QuireError as error:
        return Reply(question.number, str(error), type(error).__name__)
    return Reply(question.number, found)


def _error(reply: Reply) -> Exception:
    kind = getattr(errors, reply.error or "", None)
    if isinstance(kind, type) and issubclass(kind, ClientError):
        return kind(str(reply.found), reply.field)
    return kind(str(reply.found)) if isinstance(kind, type) and issubclass(kind, QuireError) else RuntimeError()
