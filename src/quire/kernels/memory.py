"""The machine's memory: how much of it is free, and a large piece for weights that is touched ahead of need. No torch.

The first touch of a page makes the system clear it, and a virtual machine may have to ask its host for it: that takes
longer than packing weights into it. While torch is imported only one core works, so a thread touches the pages meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
HUGE = 2 << 20
SLICE = 4 << 20  # bytes that are touched in one call


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes: all of a device's memory, and what could be taken now."""

    total: int
    free: int


def cpu_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> DeviceMemory:
    """Total and available bytes from /proc/meminfo, cut by the limit of the control group (version 2 or 1)."""
    figures = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        figures[name] = int(rest.split()[0]) * 1024
    total, free = figures["MemTotal"], figures.get("MemAvailable", figures["MemFree"])
    for limit_file, used_file, cache_key in (
        (cgroup / "memory.max", cgroup / "memory.current", "inactive_file"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _number(limit_file)
        if limit is None or limit >= total:
            continue
        # Pages of files that nobody uses are given up when memory is asked for.
        reclaimable = _stat(used_file.with_name("memory.stat"), cache_key)
        used = max(0, (_number(used_file) or 0) - reclaimable)
        total, free = limit, min(free, max(0, limit - used))
    return DeviceMemory(total, free)


def _number(file: Path) -> int | None:
    """The integer in a file; None when there is no file or it says "max"."""
    if not file.is_file():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdigit() else None


def _stat(file: Path, key: str) -> int:
    """One figure of a memory.stat file, 0 when it is not there."""
    if not file.is_file():
        return 0
    for line in file.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def fresh_memory(nbytes: int) -> mmap.mmap:
    """Memory that nobody has touched, with room to begin where a huge page may begin."""
    # Private, because shared memory gets no huge pages by default.
    memory = mmap.mmap(-1, -(-nbytes // HUGE) * HUGE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # another system, or one without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Ahead:
    """One piece of memory at a time that a thread touches until somebody takes it."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, nbytes: int) -> None:
        """Touch so many bytes from now on, in a thread; a piece that nobody took is given back."""
        self.take()
        self._wanted.clear()
        self._memory = fresh_memory(nbytes + nbytes // 16)  # weights are padded a little when they are packed
        self._thread = threading.Thread(target=self._touch, args=(self._memory, nbytes), name="memory", daemon=True)
        self._thread.start()

    def take(self) -> mmap.mmap | None:
        """The piece, if there is one; what was not touched of it by now is not touched any more."""
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()
        memory, self._memory, self._thread = self._memory, None, None
        return memory

    def _touch(self, memory: mmap.mmap, nbytes: int) -> None:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        start += -start % HUGE
        for offset in range(0, nbytes, SLICE):
            if self._wanted.is_set():
                return
            # Plain writes, which lock nothing: an madvise that populates would hold up every mmap of torch's import.
            # Called through ctypes, so that other threads of Python run meanwhile.
            ctypes.memset(start + offset, 0, min(SLICE, nbytes - offset))


AHEAD = Ahead()
