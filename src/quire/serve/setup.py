"""Setup: what a server is made of, once its options are checked and its address is taken. And its engine processes.

Starts nothing but engine processes; imports no web framework.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from quire.config import EngineOptions, ServeOptions
from quire.engine.child import Child
from quire.engine.supervisor import Patience
from quire.errors import EngineError


class Processes:
    """Starts engine processes, the first one before it is needed, until it is stopped: then those that live are killed,
    which ends a start halfway.
    """

    def __init__(self, new_process: Callable[[], Child]) -> None:
        self._new_process = new_process
        self._started: list[Child] = []
        self._stopped = False
        self._first: Child | None = new_process()
        self._started.append(self._first)

    def __call__(self) -> Child:
        """Start one."""
        if self._stopped:
            raise EngineError("The server was told to stop while it was starting.")
        first, self._first = self._first, None
        child = first or self._new_process()
        self._started = [other for other in self._started if other is not child and other.is_alive] + [child]
        return child

    def stop(self) -> None:
        """Start no more, and end those that live."""
        self._stopped = True
        for child in self._started:
            child.kill()


@dataclass(frozen=True, slots=True)
class Setup:
    """Fixed for the life of a server. `began`: when its start began, on the clock of time.perf_counter()."""

    engine: EngineOptions
    serve: ServeOptions
    keys: tuple[str, ...]
    listener: socket.socket
    patience: Patience
    processes: Processes
    began: float
