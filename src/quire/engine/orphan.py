"""What a child process does when its parent is gone. Knows nothing of either."""

from __future__ import annotations

import os
import select
import signal
import threading


def leave_signals_to_parent() -> None:
    """Ignore the signals that end a server, which may come to all its processes at once: the parent says when to end."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)


def end_with(parents_end: int) -> None:
    """End this process when the parent's end of this socket is closed, in the middle of anything if need be."""
    threading.Thread(target=_watch, args=(parents_end,), daemon=True).start()


def _watch(parents_end: int) -> None:
    poll = select.poll()
    poll.register(parents_end, 0)  # a hang-up is always told
    poll.poll()
    os._exit(0)
