"""Wakeup: what wakes a thread that waits for sockets. Knows nothing of why."""

from __future__ import annotations

import os


class Wakeup:
    """A pipe to oneself. set() may be called from any thread and from a signal handler; the rest by the one that waits."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)

    def fileno(self) -> int:
        """Readable when it was set."""
        return self._read_end

    def set(self) -> None:
        """Wake whoever waits."""
        try:
            os.write(self._write_end, b"!")
        except (BlockingIOError, OSError):  # set already, or closed
            return

    def clear(self) -> None:
        """It was heard."""
        try:
            os.read(self._read_end, 4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the pipe back. A second call changes nothing."""
        if self._write_end < 0:
            return
        os.close(self._read_end)
        write_end, self._write_end = self._write_end, -1  # whoever sets it later must not write to another file
        os.close(write_end)
