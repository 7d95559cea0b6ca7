"""Faults at every call: a profile function that raises at the n-th call of a chosen site, in any thread.

Sites are not listed by hand but found by running: every function of quire that is called, and every line of quire that
calls into a library (torch, numpy, the native kernels, msgspec, the socket).
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import quire

SOURCE = str(Path(quire.__file__).parent)
# What no library is asked for: containers, text and the like, which fail only with the whole process.
PLAIN = frozenset(
    (None, "builtins", "_thread", "time", "itertools", "functools", "collections", "_asyncio", "re", "_abc")
)


class Site(NamedTuple):
    """A place where something may go wrong: a function of quire, or a line of it and the library's function there."""

    file: str
    name: str
    line: int = 0  # 0 for a function of quire itself

    def __str__(self) -> str:
        where = self.file.removeprefix(SOURCE + "/")
        return f"{where}:{self.line} -> {self.name}" if self.line else f"{where} {self.name}"


class Fault(RuntimeError):
    """What a function of quire raises."""


class Faults:
    """Counts the calls of every site, and lets one of them fail once."""

    def __init__(self) -> None:
        self.calls: Counter[Site] = Counter()
        self._target: Site | None = None
        self._left = 0
        self.fired = False

    def aim(self, site: Site | None, nth: int = 1) -> None:
        """From now on the `nth` call of `site` raises. None: none does."""
        self.calls.clear()
        self._target, self._left, self.fired = site, nth, False

    def rest(self) -> None:
        """Nothing raises any more."""
        self._target = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this thread and in those started from now on."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """What Python calls."""
        code = frame.f_code
        if not code.co_filename.startswith(SOURCE):
            return
        if event == "call":
            site = Site(code.co_filename, code.co_qualname)
        elif event == "c_call":
            owner = getattr(arg, "__self__", None)
            module = arg.__module__ or (type(owner).__module__ if owner is not None else None)
            if module in PLAIN:
                return
            site = Site(code.co_filename, f"{module}.{arg.__qualname__}", frame.f_lineno)
        else:
            return
        self.calls[site] += 1
        if site == self._target and not self.fired:
            self._left -= 1
            if not self._left:
                self.fired = True
                raise MemoryError(f"injected at {site}") if site.line else Fault(f"injected at {site}")
