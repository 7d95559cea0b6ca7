"""ChildProcess: one engine process as its parent sees it: started with inherited descriptors, listened to, ended.

Knows the messages' socket and the black box; decides nothing. Child is what a supervisor needs of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from quire.config import EngineOptions
from quire.engine import wire
from quire.engine.blackbox import BlackBox, new_file
from quire.errors import EngineError

COMMAND = (sys.executable, "-P", "-m", "quire.engine.engine_process")  # -P: no module comes from the working folder
LAST_SECONDS = 5.0  # that a process gets to end before it is killed
OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))


class Child(Protocol):
    """An engine on the other end of a connection, which may die."""

    connection: wire.Connection[wire.FromEngine]
    box: BlackBox

    @property
    def pid(self) -> int:
        """Its number, for people."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it is there."""
        ...

    def begin(self, options: EngineOptions) -> None:
        """Let it load a model."""
        ...

    def kill(self) -> None:
        """End it now. What it sent before can still be received."""
        ...

    def close(self) -> int:
        """Make sure that it is gone and give back what it held. Returns its status; negative: ended by that signal."""
        ...


class ChildProcess:
    """A started process, which imports what it needs and waits for begin()."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        try:
            self._open(command)
        except OSError as error:
            raise EngineError(f"the engine process cannot be started: {error}") from error

    def _open(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        self.connection: wire.Connection[wire.FromEngine] = wire.Connection(ours, wire.FromEngine)
        with theirs:
            memory = new_file()
            try:
                self.box = BlackBox(memory)
                descriptors = (theirs.fileno(), memory)
                self._process = subprocess.Popen(
                    [*command, *map(str, descriptors)], stdin=subprocess.DEVNULL, pass_fds=descriptors
                )
            finally:
                os.close(memory)

    def begin(self, options: EngineOptions) -> None:
        """Let it load a model."""
        self.connection.send(wire.Start(options))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it now. What it sent before can still be received."""
        self._process.kill()
        self._process.wait()

    def close(self) -> int:
        """Make sure that it is gone and give back what it held. Returns its status; negative: ended by that signal."""
        self.connection.close()
        try:
            status = self._process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self._process.returncode
        self.box.close()  # a second time changes nothing
        return status


def came_from_outside(status: int) -> bool:
    """Whether others may have ended the process: by a kill, or by the system when memory runs out."""
    return -status in OUTSIDE


def memory_kills() -> int | None:
    """How many processes the system has killed for want of memory, of this container or machine; None: it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def ending(status: int) -> str:
    """A return code in words."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
