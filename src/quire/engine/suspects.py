"""Suspects: which request kills the engine, found in few deaths and without making the others pay for it.

Blame is what the deaths weigh that a request was computed in since its last token. Those with enough of it are tried:
group by group, each by itself, until each of its members has got a token, which clears it at once. Only what dies alone is
the culprit. A step is short and a death is dear, so groups are small and many. Knows journal entries; starts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from quire.engine.journal import Entry, Journal

# Shown to whoever made the request, so it tells nothing of the inside.
QUARANTINED = (
    "This request ended the engine more than once, the last time while it ran alone. It will not be tried again."
)
CRASH = 2  # the blame for a death by the process's own doing: a fault, an exception, a standstill
KILLED = 1  # for one that may well have come from outside: somebody's kill, the system short of memory
SUSPECTED = 2  # the blame from which on a request is tried: one crash, or two kills
CERTAIN = 4  # two crashes are proof, where the request was alone in the last one
CERTAIN_KILLS = 3  # of a request that was alone each time, until nobody would call it chance
GROUPS = 8  # that suspects are parted into; each death leaves the members of one


class Suspects:
    """The state of the search. `on_trial`: who of the present group has no token yet; nobody else may run meanwhile."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._groups: deque[list[Entry]] = deque()  # whose turn comes later
        self.on_trial: list[Entry] = []

    @property
    def searching(self) -> bool:
        """Whether deaths tell something at present: each brings the search further."""
        return bool(self.on_trial)

    def may_run(self, entry: Entry) -> bool:
        """Whether the request may be given to the engine now."""
        return not self.on_trial or entry in self.on_trial

    def died(self, in_flight: Sequence[int], blame: int) -> Entry | None:
        """Note a death while these tickets were computed. Returns the culprit if there can be no doubt."""
        here = [entry for entry in map(self._journal.get, in_flight) if entry is not None]
        for entry in here:
            entry.blame += blame
        if len(in_flight) == 1 and here:
            culprit = here[0]
            culprit.kills_alone += blame == KILLED
            if culprit.kills_alone >= CERTAIN_KILLS or (blame == CRASH and culprit.blame >= CERTAIN):
                for entry in self._journal:
                    entry.blame = entry.kills_alone = 0  # these deaths are explained
                return culprit
        if self.on_trial:
            suspected = [entry for entry in here if entry in self.on_trial]
        else:
            suspected = [entry for entry in here if entry.blame >= SUSPECTED]
        if suspected:
            self._try(suspected)
        return None

    def _try(self, suspected: Sequence[Entry]) -> None:
        """Let these be tried first, then who has waited for it. Who has never got a token is likelier to be the one."""
        rest = [entry for entry in self.on_trial if entry not in suspected]
        new = [entry for entry in suspected if not entry.emitted]
        old = [entry for entry in suspected if entry.emitted]
        self._groups.extendleft(reversed([*_parted(new), *_parted(old), *([rest] if rest else [])]))
        self.on_trial = self._groups.popleft()

    def acquit(self, entry: Entry) -> bool:
        """The request got a token, or ended. True if others may run now that had to wait."""
        if entry not in self.on_trial:
            return False
        self.on_trial.remove(entry)
        if self.on_trial:
            return False
        while self._groups and not self.on_trial:
            self.on_trial = [other for other in self._groups.popleft() if self._journal.get(other.ticket) is other]
        return True


def _parted(entries: Sequence[Entry]) -> list[list[Entry]]:
    size = -(-len(entries) // GROUPS)
    return [list(entries[start : start + size]) for start in range(0, len(entries), size)] if entries else []
