"""BlackBox: memory shared with an engine process, in which it notes what it is about to compute.

It outlives that process: after a death the supervisor reads which requests were being computed. Numbers only; no locks,
for the writer may die at any point.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence

REGIONS = 4  # plans in flight that can be told apart
REGION_BYTES = 512 * 1024
_COUNT = struct.Struct("<I")
MOST_TICKETS = (REGION_BYTES - 8) // 8


def new_file() -> int:
    """A file without a name, of the right size; the caller closes it."""
    if hasattr(os, "memfd_create"):
        found = os.memfd_create("quire-engine")
    else:
        with tempfile.TemporaryFile() as file:
            found = os.dup(file.fileno())
    os.truncate(found, REGIONS * REGION_BYTES)  # takes no memory until it is written
    return found


class BlackBox:
    """The plans in flight, as lists of tickets."""

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, REGIONS * REGION_BYTES)

    def note(self, region: int, tickets: Sequence[int]) -> None:
        """Write what a plan computes. The count comes last: a death on the way leaves an empty list."""
        start = region % REGIONS * REGION_BYTES
        kept = tickets[:MOST_TICKETS]
        _COUNT.pack_into(self._memory, start, 0)
        struct.pack_into(f"<{len(kept)}Q", self._memory, start + 8, *kept)
        _COUNT.pack_into(self._memory, start, len(kept))

    def clear(self, region: int) -> None:
        """The plan is done."""
        _COUNT.pack_into(self._memory, region % REGIONS * REGION_BYTES, 0)

    def in_flight(self) -> list[int]:
        """The tickets of all plans that were begun and not done, each once."""
        found: dict[int, None] = {}
        for region in range(REGIONS):
            start = region * REGION_BYTES
            (count,) = _COUNT.unpack_from(self._memory, start)
            found.update(dict.fromkeys(struct.unpack_from(f"<{min(count, MOST_TICKETS)}Q", self._memory, start + 8)))
        return list(found)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
