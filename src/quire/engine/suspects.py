"""Suspects: which request kills the engine, found without making the others pay for it.

Blame is what the evidence of deaths weighs that a request was in since its last token. Those with enough of it are
suspected: half of them go on with everybody else, the other half waits for their first token. Each death halves the
suspects; the last one is run alone, and only what dies alone is the culprit. Knows journal entries; starts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from quire.engine.journal import Entry, Journal

# Shown to whoever made the request, so it tells nothing of the inside.
QUARANTINED = (
    "This request ended the engine more than once, the last time while it ran alone. It will not be tried again."
)
CRASH = 3  # the blame for a death by the process's own doing: a fault, an exception, a standstill
KILLED = 2  # for one that may well have come from outside: somebody's kill, the system short of memory
SUSPECTED = 6  # the blame from which on a request is suspected: two crashes, or three kills
CERTAIN_KILLS = 3  # of a request that runs alone, until nobody would call it chance; one crash is enough


class Suspects:
    """The state of the search. `on_trial` are the suspects that run; those in later groups wait for their turn."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._groups: deque[list[int]] = deque()
        self._held: set[int] = set()  # all of the groups
        self._alone = False  # the one on trial runs and nobody else
        self._kills_alone = 0
        self.on_trial: set[int] = set()

    @property
    def searching(self) -> bool:
        """Whether deaths tell something at present: each brings the search further."""
        return bool(self.on_trial)

    def may_run(self, entry: Entry) -> bool:
        """Whether the request may be given to the engine now."""
        return entry.ticket in self.on_trial if self._alone else entry.ticket not in self._held

    def died(self, in_flight: Sequence[int], blame: int) -> Entry | None:
        """Note a death while these tickets were computed. Returns the culprit if there can be no doubt."""
        here = [entry for entry in map(self._journal.get, in_flight) if entry is not None]
        for entry in here:
            entry.blame += blame
        tried = [entry.ticket for entry in here if entry.ticket in self.on_trial]
        if self._alone:
            return self._died_alone(tried, blame)
        suspected = tried or [entry.ticket for entry in here if entry.blame >= SUSPECTED]
        if not suspected:
            return None
        rest = self.on_trial.difference(suspected)
        middle = (len(suspected) + 1) // 2
        self._groups.extendleft(group for group in (sorted(rest), suspected[middle:]) if group)
        self.on_trial = set(suspected[:middle])
        self._alone, self._kills_alone = len(suspected) == 1, 0
        self._held = {ticket for group in self._groups for ticket in group}
        return None

    def _died_alone(self, tried: Sequence[int], blame: int) -> Entry | None:
        if not tried:
            return None  # nothing was computed: nobody's fault, the same once more
        self._kills_alone += 1
        if blame < CRASH and self._kills_alone < CERTAIN_KILLS:
            return None
        culprit = self._journal.get(tried[0])
        for entry in self._journal:
            entry.blame = 0  # these deaths are explained
        return culprit

    def acquit(self, ticket: int) -> bool:
        """The request got a token, or ended. True if others may run now that had to wait."""
        if ticket not in self.on_trial:
            return False
        self.on_trial.discard(ticket)
        if self.on_trial:
            return False
        was_alone, self._alone = self._alone, False
        while self._groups and not self.on_trial:
            self.on_trial = {ticket for ticket in self._groups.popleft() if self._journal.get(ticket) is not None}
            self._held = {ticket for group in self._groups for ticket in group}
        return was_alone or bool(self.on_trial)
