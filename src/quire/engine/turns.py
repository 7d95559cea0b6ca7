"""Turns: an engine that several threads use makes one step at a time, for each of them in turn, and whole ones.

Knows no engine; whoever has one brings it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Turns:
    """A lock that is fair between two who want it all the time: `with turns:` makes who comes later wait longer."""

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._room = threading.Lock()

    def __enter__(self) -> None:
        """Wait for the turn."""
        with self._door:
            self._room.acquire()

    def __exit__(self, *_: object) -> None:
        """Let the next one in."""
        self._room.release()


class HeldInterrupts:
    """Ctrl-C within this block waits until check() is called, at the latest for the end of the block.

    What is interrupted in its middle cannot go on. A second Ctrl-C does not wait, in case the step never ends.
    Signals come to the main thread alone; elsewhere, and where somebody has put a handler of C, nothing is held.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGINT)
        self._holds = callable(self._handler) and threading.current_thread() is threading.main_thread()
        self._held = False

    def __enter__(self) -> HeldInterrupts:
        """Begin to hold."""
        if self._holds:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the handler back what came."""
        if self._holds:
            signal.signal(signal.SIGINT, self._handler)
        self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pass_on(number, frame)
        self._held = True

    def check(self) -> None:
        """Raise what came meanwhile, if something did."""
        if self._held:
            self._held = False
            self._pass_on(signal.SIGINT, None)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        assert callable(self._handler), "only such ones are held"
        self._handler(number, frame)
