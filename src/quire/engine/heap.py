"""What the collector of cycles need not look at: everything that is there when a process has started.

Importing torch and transformers makes a million objects. Looking at them all takes the collector 0.2 s, in the middle of
a step or of everybody's streams.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG, MIDDLE, OLD = 50_000, 20, 50  # new objects until the young are looked at, then the middle ones, then all


def keep_for_good() -> None:
    """Leave what exists now out of all later collections, and collect less often: a step over many streams makes
    thousands of objects that are gone with it. For processes of quire's own; not for a user's program.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)


@contextmanager
def uncollected() -> Iterator[None]:
    """While entered, nobody looks for cycles: for imports, whose objects stay. A tenth of torch's import is that search."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
