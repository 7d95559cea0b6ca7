"""Spare: where a supervisor's next engine process comes from: one that is ready and waits, or a new one.

A spare process has imported everything and loaded nothing, which takes longer than loading a small model. Knows no
requests.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from quire.engine.child import Child
from quire.errors import EngineError

logger = logging.getLogger(__name__)

SOON_SECONDS = 0.5  # after a restart, when what was lost has been computed again
AGAIN_SECONDS = 60.0  # until the next try where a spare process could not be started


class Spare:
    """`after`: seconds after due() that a spare is started; None: never. One thread uses it."""

    def __init__(self, new_process: Callable[[], Child], after: float | None, clock: Callable[[], float]) -> None:
        self.process: Child | None = None
        self._new_process = new_process
        self._after = after
        self._clock = clock
        self._at = 0.0

    def due(self, after_death: bool) -> None:
        """An engine has come up: count the time until the next one is prepared. Deaths come in company."""
        self._at = self._clock() + min(self._after or 0.0, SOON_SECONDS if after_death else math.inf)

    def prepare(self) -> None:
        """Start the process that will take over one day, if it is time. Nothing waits for it."""
        if self.process is not None or self._after is None or self._clock() < self._at:
            return
        try:
            self.process = self._new_process()
        except EngineError as error:
            logger.warning("there is no spare engine process: %s", error)
            self._at = self._clock() + AGAIN_SECONDS

    def take(self) -> Child:
        """The spare process, if it lives, or a new one. Raises EngineError."""
        process, self.process = self.process, None
        if process is not None and not process.is_alive:
            process.close()
            process = None
        return process or self._new_process()

    def close(self) -> None:
        """End the spare process."""
        process, self.process = self.process, None
        if process is not None:
            process.close()
