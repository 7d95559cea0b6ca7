"""Suspects: which request kills the engine, found in few deaths and without making the others pay for it.

After a crash the requests that were computed are tried: group by group, each by itself, until each of its members has got
a token, which clears it at once. A kill from outside is evidence only against who was alone; but whoever has been without
a token over two deaths goes first, all together, and a death of that group counts. Only what dies alone is the culprit. A
step is short and a death is dear, so groups are small and many. Knows journal entries; starts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum

from quire.engine.journal import Entry, Journal

# Shown to whoever made the request, so it tells nothing of the inside.
QUARANTINED = (
    "This request ended the engine more than once, the last time while it ran alone. It will not be tried again."
)
LATE = 2  # deaths since its last token, from which on a request goes before the others
GROUPS = 8  # that suspects are parted into; each death leaves the members of one


class Cause(IntEnum):
    """Why an engine ended; as a number, how many such deaths convict a request that was alone (of crashes: in the last)."""

    CRASH = 2  # the process's own doing: a fault, an exception, a standstill
    SHORTAGE = 3  # the system killed it, short of memory, or may have done so
    KILL = 8  # somebody did, who may well do it again: so often that nobody would call it chance


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

    def died(self, in_flight: Sequence[int], cause: Cause) -> Entry | None:
        """Note a death while these tickets were computed. Returns the culprit if there can be no doubt."""
        crashed = cause is Cause.CRASH
        here = [entry for entry in map(self._journal.get, in_flight) if entry is not None]
        for entry in self._journal:
            entry.deaths += 1
        for entry in here:
            entry.blame += 1
        if len(in_flight) == 1 and here:
            alone = here[0]
            alone.kills_alone += not crashed
            if (alone.blame if crashed else alone.kills_alone) >= cause:
                for entry in self._journal:
                    entry.clear()  # these deaths are explained
                return alone
        if self.on_trial or crashed:
            suspected = [entry for entry in here if self.may_run(entry)]
            if suspected:
                self._try(suspected)
        else:
            # Who has not begun waits for a place as it did before.
            late = [entry for entry in self._journal if entry.deaths >= LATE]
            self.on_trial = [entry for entry in late if entry.emitted or entry.blame]
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
