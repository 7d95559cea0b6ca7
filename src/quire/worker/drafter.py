"""Drafter: guesses what comes next; History: the tokens of every row on the host, which guesses are made from.

A guess is never wrong in what it does to the output, only in what it costs: every draft is verified by the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from quire.core.plan import Admission, Span, SpanResult, StepPlan

MOST_LATE = 1 << 14  # tokens that wait to be entered


class History:
    """Tokens known so far, row by row. What steps append is entered when somebody looks, which is seldom while nobody
    drafts."""

    def __init__(self, num_slots: int, width: int) -> None:
        self._tokens = np.empty((num_slots, width), dtype=np.int32)
        self._lengths = np.zeros(num_slots, dtype=np.int64)
        self._late: tuple[list[int], list[int], list[int]] = ([], [], [])  # rows, positions, tokens

    @property
    def tokens(self) -> np.ndarray:
        """int32 [num_slots, width], of which `lengths` are there."""
        self._enter()
        return self._tokens

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_slots]."""
        self._enter()
        return self._lengths

    def admit(self, new: Admission) -> None:
        """Take in a request's tokens."""
        self.tokens[new.slot, : len(new.token_ids)] = new.token_ids
        self.lengths[new.slot] = len(new.token_ids)

    def extend(self, slot: int, known: int, tokens: tuple[int, ...]) -> None:
        """Append what a step brought to the `known` tokens that the row had."""
        self.tokens[slot, known : known + len(tokens)] = tokens
        self.lengths[slot] = known + len(tokens)

    def append(self, slots: Sequence[int], known: Sequence[int], tokens: Sequence[int]) -> None:
        """The same with one token for each of the rows `slots`, which knew `known` tokens."""
        for late, more in zip(self._late, (slots, known, tokens), strict=True):
            late.extend(more)
        if len(self._late[0]) > MOST_LATE:
            self._enter()

    def _enter(self) -> None:
        slots, known, tokens = self._late
        if slots:
            rows, ends = np.array(slots), np.array(known)
            self._tokens[rows, ends] = tokens
            np.maximum.at(self._lengths, rows, ends + 1)
            self._late = ([], [], [])


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step computed, for drafters that go on from the model's own hidden states.

    Row i has positions [starts[i], starts[i] + counts[i]), rejected drafts left out; their states are in `hidden` [T,
    size] from row firsts[i] on.
    """

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray
    hidden: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], results: Sequence[SpanResult], hidden: torch.Tensor) -> Seen:
        """Of a step whose results are there."""
        computed = np.array([span.count for span in spans])
        wrong = [
            len(span.drafts) + 1 - len(result.tokens) if span.sample else 0
            for span, result in zip(spans, results, strict=True)
        ]
        return cls(
            np.array([span.slot for span in spans]),
            np.array([span.start for span in spans]),
            computed - np.minimum(wrong, computed),
            np.cumsum(computed) - computed,
            hidden,
        )


class Drafter(Protocol):
    """One way of guessing."""

    def admit(self, new: Admission) -> None:
        """Another request is in this row now."""
        ...

    def release(self, slot: int) -> None:
        """The row's request has left; the history still has what it said."""
        ...

    def begin(self, plan: StepPlan) -> None:
        """A step is about to be computed, with the pages that its plan grants and copies."""
        ...

    def follow(self, seen: Seen) -> None:
        """A step has been computed, with a model that keeps its hidden states; propose() comes next."""
        ...

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """Guesses for rows `slots` int64 [R], by the history's tokens: what follows each, possibly nothing."""
        ...
