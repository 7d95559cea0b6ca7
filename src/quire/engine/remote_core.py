"""RemoteCore: an EngineCore in another process, as far as it is the same whoever has that process.

Supervisor has one of its own, SharedCore shares its parent's. Knows messages, no process.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable

from quire import errors
from quire.core.request import CoreRequest
from quire.core.stats import Queue
from quire.engine import wire
from quire.engine.core import EngineCore
from quire.engine.in_transit import Gate
from quire.engine.wakeup import Wakeup
from quire.errors import EngineError, QuireError, ValidationError

OnPhase = Callable[[str, float | None], None]  # a phase of the start begins, or is over after so many seconds
OnTokenizer = Callable[[wire.Tokenizing], None]

TICK = 0.5  # seconds after which a step without news ends, so that silence is noticed
LOOK_SECONDS = 3.0  # a look at the pages lasts so long
PICTURE_SECONDS = 0.2  # between two pictures


class RemoteCore(ABC):
    """Not thread-safe, except for interrupt(): one thread calls it."""

    resumable = True  # what has arrived is kept until it is handed out

    def __init__(self) -> None:
        self._wakeup = Wakeup()
        self._calls = itertools.count(1)
        self._answers: dict[int, bool | Queue | None] = {}
        self._gate: Gate  # known with the start

    def heard_at_start(
        self, message: wire.FromEngine, on_phase: OnPhase | None, on_tokenizer: OnTokenizer | None
    ) -> wire.Ready | None:
        """Take a message of the engine's start; the last one is returned. Raises what it could not be started for."""
        if isinstance(message, wire.Tokenizing) and on_tokenizer is not None:
            on_tokenizer(message)
        elif isinstance(message, wire.Phase) and on_phase is not None:
            on_phase(message.name, message.seconds)
        elif isinstance(message, wire.Failed):
            raise start_error(message)
        elif isinstance(message, wire.Ready):
            self._gate = Gate(message.scheduler)
            return message
        return None

    def refuse(self, request: CoreRequest, is_running: bool) -> None:
        """Raise ValidationError or CapacityError for a request that could never run, or whose id another one has."""
        if is_running:
            raise ValidationError(
                "A request with this id is running; choose another, or wait for its end",
                "request_id",
                request.request_id,
            )
        self._gate.refuse(request)

    def has_work(self) -> bool:
        """True: even without requests there is something to hear, and a process to look after."""
        return True

    def interrupt(self) -> None:
        """Let a step() that waits return. May be called from any thread."""
        self._wakeup.set()

    def before(self, request_id: str) -> Queue | None:
        """What has its turn before a request that waits; None for one that does not, or while there is no engine."""
        ticket = self._ticket_of(request_id)
        found = None if ticket is None else self._ask("before", ticket, request_id)
        return found if isinstance(found, Queue) else None

    def reset_prefix_cache(self) -> bool:
        """Forget all cached pages. False when requests still hold some."""
        return bool(self._ask("reset_prefix_cache"))

    @abstractmethod
    def _ticket_of(self, request_id: str) -> int | None:
        """The ticket under which the engine has a request; None where it has not."""

    @abstractmethod
    def _ask(self, name: wire.CallName, ticket: int = 0, request_id: str = "") -> bool | Queue | None:
        """Call a method of the core and wait for its answer."""


def answered(core: EngineCore | RemoteCore, call: wire.Call) -> wire.Answer:
    """The other side of it: what the core says to a call."""
    if call.name == "before":
        return wire.Answer(call.number, core.before(wire.core_id(call.ticket, call.request_id)))
    return wire.Answer(call.number, core.reset_prefix_cache())


def start_error(message: wire.Failed) -> Exception:
    """What the engine could not be started for, as the exception that it was, where it is one of quire's."""
    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, QuireError):
        return kind(message.message)
    return EngineError(f"The engine could not be started: {message.kind}: {message.message}")
