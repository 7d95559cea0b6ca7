"""An engine "process" that is a thread, over a tiny model that stays loaded: dies and comes back within milliseconds.

Everything else is real: the socket and its messages, the engine's loop, the scheduler, the worker and its kernels.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from quire.config import EngineOptions
from quire.engine import wire
from quire.engine.blackbox import BlackBox, new_file
from quire.engine.engine_process import Served, Tell, live


class ThreadChild:
    """What a Supervisor needs of a child. Its status is 1 when its loop raised."""

    pid = 0

    def __init__(self, load: Callable[[EngineOptions, Tell], Served]) -> None:
        ours, self._theirs = socket.socketpair()
        memory = new_file()
        self.box = BlackBox(memory)
        self._box = BlackBox(memory)
        os.close(memory)
        self.connection: wire.Connection[wire.FromEngine] = wire.Connection(ours, wire.FromEngine)
        self.status = 0
        self._load = load
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        connection: wire.Connection[wire.ToEngine] = wire.Connection(self._theirs, wire.ToEngine)
        try:
            self.status = live(self._load, connection, self._box)
        except BaseException:  # a real process would print it and end
            self.status = 1
        finally:
            self._theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def begin(self, options: EngineOptions) -> None:
        self.connection.send(wire.Start(options))

    def kill(self) -> None:
        self._theirs.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)

    def close(self) -> int:
        self.connection.close()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the engine's thread does not end"
        self.box.close()
        self._box.close()
        return self.status
