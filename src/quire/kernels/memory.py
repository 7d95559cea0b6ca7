"""The machine's memory: how much of it is free, and a large piece for weights that is touched ahead of need. No torch.

The first touch of a page makes the system clear it, and a virtual machine may have to ask its host for it: that takes
longer than packing weights into it. A mapped file's pages must be found one by one. While torch is imported only one core
works, so a thread touches the pages meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
    total, free = _machine_memory(meminfo)
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


def _machine_memory(meminfo: Path) -> tuple[int, int]:
    """Total and available bytes. Where there is no /proc, what the C library says, which counts no files as available."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    figures = {}
    for line in lines:
        name, _, rest = line.partition(":")
        figures[name] = int(rest.split()[0]) * 1024
    return figures["MemTotal"], figures.get("MemAvailable", figures["MemFree"])


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


def mapped_file(file: BinaryIO) -> mmap.mmap:
    """The whole file, in huge pages where the file system has them. What is written to it stays in this process."""
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
        with contextlib.suppress(AttributeError, OSError):  # not every system or file system has it
            memory.madvise(getattr(mmap, advice))
    return memory


class FilePages:
    """Mapped files that nobody writes to, whose pages can be let go: what is read again comes back from the file."""

    def __init__(self) -> None:
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._lock = threading.Lock()  # several models may be loaded at once

    def add(self, memory: mmap.mmap) -> None:
        """A file that was mapped. It is forgotten when its last view is gone."""
        with self._lock:
            self._maps.add(memory)

    def let_go(self, address: int, nbytes: int) -> None:
        """Give the pages of these bytes back, where they are those of such a file."""
        with self._lock:
            maps = list(self._maps)
        for memory in maps:
            start = address - ctypes.addressof(ctypes.c_char.from_buffer(memory))
            if 0 <= start < len(memory):
                first = start // mmap.PAGESIZE * mmap.PAGESIZE
                memory.madvise(mmap.MADV_DONTNEED, first, min(start + nbytes, len(memory)) - first)


class Ahead:
    """Memory that a thread touches until somebody takes it: a fresh piece for weights, or a file of packed ones."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._file: os.stat_result | None = None  # of the file, where it is one
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, nbytes: int) -> None:
        """Touch so many fresh bytes from now on; what nobody took before is given back."""
        # Weights are padded a little when they are packed.
        self._start(fresh_memory(nbytes + nbytes // 16), nbytes, None)

    def begin_file(self, path: Path) -> None:
        """Read a file from now on. Raises OSError or ValueError where it cannot be mapped."""
        with path.open("rb") as file:
            memory = mapped_file(file)
            self._start(memory, len(memory), os.fstat(file.fileno()))

    def take(self) -> mmap.mmap | None:
        """The fresh piece, if there is one; what was not touched of it by now is not touched any more."""
        return None if self._file is not None else self._stop()

    def take_file(self, file: BinaryIO) -> mmap.mmap:
        """The mapped file: as it was begun, or mapped now."""
        if self._file is not None and os.path.samestat(self._file, os.fstat(file.fileno())):
            return self._stop() or mapped_file(file)
        return mapped_file(file)

    def give_back(self) -> None:
        """Nothing of it is needed any more."""
        self._stop()

    def _start(self, memory: mmap.mmap, nbytes: int, file: os.stat_result | None) -> None:
        self._stop()
        self._wanted.clear()
        self._memory, self._file = memory, file
        self._thread = threading.Thread(target=self._touch, args=(memory, nbytes), name="memory", daemon=True)
        self._thread.start()

    def _stop(self) -> mmap.mmap | None:
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()
        memory, self._memory, self._file, self._thread = self._memory, None, None, None
        return memory

    def _touch(self, memory: mmap.mmap, nbytes: int) -> None:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        start += -start % (HUGE if self._file is None else 1)
        copy = ctypes.create_string_buffer(0 if self._file is None else SLICE)
        for offset in range(0, nbytes, SLICE):
            if self._wanted.is_set():
                return
            # Plain writes and reads, which lock nothing: an madvise that populates would hold up every mmap of torch's
            # import. Called through ctypes, so that other threads of Python run meanwhile.
            here, size = start + offset, min(SLICE, nbytes - offset)
            if self._file is None:
                ctypes.memset(here, 0, size)
            else:
                ctypes.memmove(copy, here, size)


AHEAD = Ahead()
FILE_PAGES = FilePages()
