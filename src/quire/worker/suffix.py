"""SuffixDrafter: the output goes on copying the place in its own text that it has copied longest.

Beside n-gram lookup it looks for the longest end that came before, however long, and guesses the more the longer that
is: a match of two tokens promises two more, one of twenty a whole sentence. A row that keeps copying is not searched.
Where an earlier output under the same salt (see memory.py) matches longer than the row's own text, it is copied from.
"""

from __future__ import annotations

import numpy as np

from quire.core.plan import Admission, StepPlan
from quire.worker.drafter import History, Seen
from quire.worker.past_outputs import GRAM, PastOutputs

SURE = 8  # tokens of a match that needs no better one


class SuffixDrafter:
    """Keeps for each row the place that it copies from. Costs a look at the row's text where it copies nothing."""

    def __init__(self, history: History, count: int, shortest: int, longest: int, factor: float) -> None:
        self._history = history
        self._count = count  # tokens to propose, at most
        self._shortest = shortest  # tokens that must have come before, at least
        self._longest = longest  # tokens of a match that are looked at, at most
        self._factor = factor  # tokens to propose for each one that matches
        rows = len(history.lengths)
        self._places = np.zeros(rows, dtype=np.int64)  # what comes next is guessed to be the token there; 0 for none
        self._matched = np.zeros(rows, dtype=np.int64)  # tokens before it that are those at the row's end
        self._known = np.zeros(rows, dtype=np.int64)  # the row's length then
        self._past = PastOutputs()
        self._salts = [b""] * rows
        self._begins = np.zeros(rows, dtype=np.int64)  # where what the row's request says from now on does

    def admit(self, new: Admission) -> None:
        """Another request is in this row: it copies nothing yet."""
        self._places[new.slot] = self._matched[new.slot] = 0
        self._salts[new.slot], self._begins[new.slot] = new.salt, len(new.token_ids)

    def release(self, slot: int) -> None:
        """What the row's request has said may be said again."""
        output = self._history.tokens[slot, self._begins[slot] : self._history.lengths[slot]].tolist()
        if len(output) > GRAM:
            self._past.of(self._salts[slot]).add(output)

    def begin(self, plan: StepPlan) -> None:
        """No pages are used."""

    def follow(self, seen: Seen) -> None:
        """Hidden states mean nothing here."""

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """What follows the copied places."""
        return [self._row(slot) for slot in slots.tolist()]

    def _row(self, slot: int) -> tuple[int, ...]:
        length = int(self._history.lengths[slot])
        tokens = self._history.tokens[slot, :length]
        place, matched = int(self._places[slot]), int(self._matched[slot])
        if place:
            known = int(self._known[slot])
            if np.array_equal(tokens[place : place + length - known], tokens[known:]):
                place, matched = place + length - known, matched + length - known
            else:
                place = matched = 0
        if matched < SURE:
            place, matched = self._search(tokens, place, matched)
        self._places[slot], self._matched[slot], self._known[slot] = place, matched, length
        if matched < SURE:
            said = self._past.of(self._salts[slot])
            there, same = said.find(tokens[-self._longest :].tolist(), self._longest)
            if same > matched:
                return said.after(there, self._promised(same))
        if matched < self._shortest:
            return ()
        return tuple(tokens[place : place + self._promised(matched)].tolist())

    def _promised(self, matched: int) -> int:
        """Tokens to propose behind so many that match."""
        return min(self._count, max(1, int(self._factor * matched)))

    def _search(self, tokens: np.ndarray, place: int, matched: int) -> tuple[int, int]:
        """The place behind the longest match, and its length; as given where nothing is longer.

        Of equally long ones it is the latest of those that are followed by what most of them are followed by.
        """
        last = len(tokens) - 1
        ends = np.flatnonzero(tokens[:last] == tokens[last])
        found = 0
        while ends.size:
            found += 1
            best = ends
            if found == self._longest or found > last:
                break
            ends = ends[ends >= found]
            ends = ends[tokens[ends - found] == tokens[last - found]]
        if found <= matched:
            return place, matched
        following = tokens[best + 1]
        values, counts = np.unique(following, return_counts=True)
        return int(best[following == values[counts.argmax()]][-1]) + 1, found
