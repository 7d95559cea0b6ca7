"""Constraint: the state of one output within its grammar, and the tokens that may follow. fill_masks: for many at once.

Owned by whoever chooses the tokens. Knows token ids and bits; knows no tensors and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from quire.errors import RequestFailedError

BITS = 32  # of one word of a mask


def mask_width(vocab_size: int) -> int:
    """Words of a mask with one bit for each token."""
    return -(-vocab_size // BITS)


class Constraint:
    """Follows one output. `end_ids` end it; they are allowed only where the output is complete."""

    __slots__ = ("_end_ids", "_matcher", "_past_end")

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._past_end = 0  # ends that were taken after the output was complete

    def fork(self) -> Constraint:
        """Another one at the same place, for an output that goes on otherwise."""
        made = Constraint(self._matcher.deep_copy(), self._end_ids)
        made._past_end = self._past_end
        return made

    def advance(self, token_ids: Sequence[int]) -> int:
        """Take tokens in; how many of them the grammar allows. Those from the first wrong one on change nothing."""
        taken = self._matcher.try_consume_tokens(list(token_ids)) if not self.done else 0
        while taken < len(token_ids) and token_ids[taken] in self._end_ids and self.done:
            self._past_end += 1
            taken += 1
        return taken

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were taken in. RequestFailedError where that cannot be done."""
        back = min(count, self._past_end)
        self._past_end -= back
        if count > back and not self._matcher.rollback(count - back):
            raise RequestFailedError(f"the grammar cannot go back {count} tokens: {self._matcher.get_error()[:300]}")

    def fits(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens could be taken in, which they are not."""
        return 0 if self.done else self._matcher.validate_tokens(list(token_ids))

    def forced(self) -> list[int]:
        """The tokens that must come next, whatever is chosen, as the tokenizer would write their text."""
        return [] if self.done else self._matcher.compute_ff_tokens()

    @property
    def failure(self) -> str | None:
        """Why the grammar cannot go on, if it cannot: it needs more work than its limits allow."""
        return self._matcher.get_error()[:300] if self._matcher.is_error() else None

    @property
    def done(self) -> bool:
        """Whether the output is complete and only an end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class MaskWish(NamedTuple):
    """Which tokens may come next, wanted in row `row` of a mask; and behind each of `drafts`, in the rows that follow."""

    constraint: Constraint
    row: int
    drafts: Sequence[int] = ()


class MaskFiller:
    """Fills masks by several native threads, without Python's lock, so that other work goes on meanwhile."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @cached_property
    def _executor(self) -> LLExecutor:
        """The threads, which begin when they are first needed."""
        return LLExecutor(self._threads)

    def fill(self, wishes: Sequence[MaskWish], mask: NDArray[np.int32]) -> None:
        """Set the bits of the allowed tokens in `mask` [R, mask_width(vocabulary)], which must be zero.

        Behind a draft that is not allowed nothing is. A constraint that fails leaves its rows empty: see failure().
        """
        single, several = [], []
        for wish in wishes:
            constraint = wish.constraint
            if constraint.done:
                bits = mask[wish.row].view(np.uint8)
                for token_id in constraint._end_ids:
                    bits[token_id >> 3] |= 1 << (token_id & 7)
            elif wish.drafts:
                several.append((constraint._matcher, wish.row, list(wish.drafts)))
            else:
                single.append((constraint._matcher, wish.row))
        (rows, width), place = mask.shape, mask.ctypes.data
        if single:
            self._executor.unsafe_compute_mask_ptr(single, place, 4 * width, rows)
        if several:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(several, place, 4 * width, rows)
