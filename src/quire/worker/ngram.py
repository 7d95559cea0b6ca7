"""NgramDrafter: what followed the last few tokens when they came before, is what will follow them now.

Good where the output repeats its input: summaries, corrections, code. Knows no model and costs next to nothing.
"""

from __future__ import annotations

import numpy as np

from quire.core.plan import Admission, StepPlan
from quire.worker.drafter import History, Seen


class NgramDrafter:
    """Looks for the longest end of a row, of `shortest` to `longest` tokens, that occurs earlier in the same row."""

    def __init__(self, history: History, count: int, shortest: int, longest: int) -> None:
        self._history = history
        self._count = count  # tokens to propose, at most
        self._shortest = shortest
        self._longest = longest

    def admit(self, new: Admission) -> None:
        """Nothing is kept beside the history."""

    def release(self, slot: int) -> None:
        """Nothing is kept of a request that has left."""

    def begin(self, plan: StepPlan) -> None:
        """No pages are used."""

    def follow(self, seen: Seen) -> None:
        """Hidden states mean nothing here."""

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """The tokens behind the match; all rows are searched at once, from long ends to short ones."""
        history = self._history
        lengths = history.lengths[slots]
        found = np.full(len(slots), -1, dtype=np.int64)  # where the continuation begins
        if len(slots) and lengths.max() > self._shortest:
            self._search(history.tokens[slots, : lengths.max()], lengths, found)
        return [
            tuple(history.tokens[slot, first : min(first + self._count, length)].tolist()) if first >= 0 else ()
            for slot, first, length in zip(slots.tolist(), found.tolist(), lengths.tolist(), strict=True)
        ]

    def _search(self, tokens: np.ndarray, lengths: np.ndarray, found: np.ndarray) -> None:
        """Fill `found` [R]; `tokens` [R, W] may hold anything behind each row's length.

        Column i of `match` says whether the n tokens that end at i are the row's last n. It grows by one token at a
        time, so that each row is read once for each length.
        """
        rows, width = tokens.shape
        places = np.arange(width)
        match = np.broadcast_to(places < lengths[:, None] - 1, (rows, width)).copy()
        for size in range(1, min(self._longest, width - 1) + 1):
            back = np.maximum(lengths - size, 0)
            last = tokens[np.arange(rows), back]
            # The token at `size - 1` before column i must be the row's own at that distance from its end.
            same = np.zeros_like(match)
            same[:, size - 1 :] = tokens[:, : width - size + 1] == last[:, None]
            match &= same
            match[lengths <= size] = False
            if size >= self._shortest:
                self._note(match, lengths, found)

    def _note(self, match: np.ndarray, lengths: np.ndarray, found: np.ndarray) -> None:
        """Rows with a match continue behind the one with the most tokens to copy; of equals, behind the latest."""
        rows = np.flatnonzero(match.any(axis=1))
        if not rows.size:
            return
        follow = lengths[rows, None] - 1 - np.arange(match.shape[1])  # tokens behind each column
        worth = np.where(match[rows], np.minimum(follow, self._count), 0)
        latest = match.shape[1] - 1 - worth[:, ::-1].argmax(axis=1)
        found[rows] = latest + 1
