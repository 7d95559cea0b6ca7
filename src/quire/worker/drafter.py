"""Drafter: guesses what comes next; History: the tokens of every row on the host, which guesses are made from.

A guess is never wrong in what it does to the output, only in what it costs: every draft is verified by the model.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from quire.core.plan import Admission


class History:
    """Tokens known so far, row by row: `tokens` int32 [num_slots, width], of which `lengths` [num_slots] are there."""

    def __init__(self, num_slots: int, width: int) -> None:
        self.tokens = np.empty((num_slots, width), dtype=np.int32)
        self.lengths = np.zeros(num_slots, dtype=np.int64)

    def admit(self, new: Admission) -> None:
        """Take in a request's tokens."""
        self.tokens[new.slot, : len(new.token_ids)] = new.token_ids
        self.lengths[new.slot] = len(new.token_ids)

    def extend(self, slot: int, known: int, tokens: tuple[int, ...]) -> None:
        """Append what a step brought to the `known` tokens that the row had."""
        self.tokens[slot, known : known + len(tokens)] = tokens
        self.lengths[slot] = known + len(tokens)


class Drafter(Protocol):
    """One way of guessing."""

    def admit(self, slot: int) -> None:
        """Another request is in this row now."""
        ...

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """Guesses for rows `slots` int64 [R], by the history's tokens: what follows each, possibly nothing."""
        ...
