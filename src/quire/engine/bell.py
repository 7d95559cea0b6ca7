"""Bell: what wakes a thread that waits for sockets. Knows nothing of why."""

from __future__ import annotations

import os


class Bell:
    """A pipe to oneself. ring() may be called from any thread and from a signal handler; the rest by the one that waits."""

    def __init__(self) -> None:
        self._bell, self._rope = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._rope, False)

    def fileno(self) -> int:
        """Readable when it was rung."""
        return self._bell

    def ring(self) -> None:
        """Wake whoever waits."""
        try:
            os.write(self._rope, b"!")
        except (BlockingIOError, OSError):  # rung already, or closed
            return

    def hush(self) -> None:
        """It was heard."""
        try:
            os.read(self._bell, 4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the pipe back. A second call changes nothing."""
        if self._rope < 0:
            return
        os.close(self._bell)
        rope, self._rope = self._rope, -1  # whoever rings later must not write to another file
        os.close(rope)
