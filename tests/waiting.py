"""Waiting for what must happen, however slow the machine is: for a condition, never for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT = 180.0  # seconds after which it counts as a failure: far more than it takes on the slowest machine
PAUSE = 0.01


def until(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    """Return when the condition holds; fail when it does not come to that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(PAUSE)


async def when(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    """The same in an event loop, which goes on meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(PAUSE)
