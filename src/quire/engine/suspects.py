"""Suspects: which request kills the engine, found by letting those that may be to blame run alone.

A request that was being computed in two deaths, without a token in between, is suspected. Suspects are tried in groups
while everybody else waits; a group that dies is halved, one that goes on is acquitted. A request that dies alone is the
culprit. Knows journal entries; starts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from quire.engine.journal import Entry, Journal

# Shown to whoever made the request, so it tells nothing of the inside.
QUARANTINED = (
    "This request ended the engine more than once, the last time while it ran alone. It will not be tried again."
)
DEATHS = 2  # from which on a request is suspected


class Suspects:
    """The state of the search. `on_trial` is None while there is none: then everybody may run."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._groups: deque[list[int]] = deque()
        self.on_trial: set[int] | None = None

    def may_run(self, entry: Entry) -> bool:
        """Whether the request may be given to the engine now."""
        return self.on_trial is None or entry.ticket in self.on_trial

    def died(self, in_flight: Sequence[int]) -> Entry | None:
        """Note a death while these tickets were computed. Returns the culprit if there can be no doubt."""
        here = [entry for entry in map(self._journal.get, in_flight) if entry is not None]
        for entry in here:
            entry.deaths += 1
        if self.on_trial is None:
            suspected = [entry.ticket for entry in here if entry.deaths >= DEATHS]
        else:
            suspected = [entry.ticket for entry in here if entry.ticket in self.on_trial]
            if not suspected:
                return None  # nobody's fault; the same trial again
        if not suspected:
            return None
        if len(here) == 1:
            self._next()
            return here[0]
        middle = (len(suspected) + 1) // 2
        self._groups.extendleft(group for group in (suspected[middle:], suspected[:middle]) if group)
        self._next()
        return None

    def acquit(self, ticket: int) -> bool:
        """The request got a token, or ended. True if the next group's turn has come, or everybody's."""
        if self.on_trial is None or ticket not in self.on_trial:
            return False
        self.on_trial.discard(ticket)
        if self.on_trial:
            return False
        self._next()
        return True

    def _next(self) -> None:
        """The next group that still has a live member; everybody when there is none."""
        while self._groups:
            alive = {ticket for ticket in self._groups.popleft() if self._journal.get(ticket) is not None}
            if alive:
                self.on_trial = alive
                return
        self.on_trial = None
